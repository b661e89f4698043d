from __future__ import annotations

from typing import TYPE_CHECKING

from scanpy import logging as logg

from scvi_ext import results
from scvi_ext.fitted import Fitted
from scvi_ext.functional.inflation import technical_zero_probability

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from anndata import AnnData

    from scvi_ext._contract import Minibatch
    from scvi_ext.engine.map_cells import Draws


def get_technical_zeros(
    adata: AnnData,
    *,
    key: str | None = None,
    indices: Sequence | None = None,
    batch_size: int | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    r"""Probability that a zero is technical, from a fit with a zero-inflated negative binomial.

    A zero of a gene that the cell should have plenty of is hard to explain by counting alone. With q the inflation and
    NB(0) the probability of counting nothing, both at the mean of q(z \| x), it is technical with probability
    q / (q + (1 - q) NB(0)). ``tl.get_likelihood_parameters`` has q itself, which does not look at the count. Of a fit
    of AutoZI q is (1 - E[delta]) pi.

    Parameters
    ----------
    adata
        Annotated data that holds the fit.
    key
        Which fit; the last one by default.
    indices
        The cells: positions, mask or names. The others become NaN.
    batch_size
        Cells per forward pass; results do not depend on it.
    key_added
        Slot to write, ``"<key>_technical_zeros"`` by default.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    ``None``, or the changed copy. Sets

    ``adata.layers["<key>_technical_zeros"]``
        float32, cells x genes, 0 where there is a count; genes that the fit does not know are NaN.

    Raises
    ------
    KeyError
        No such fit, or genes of the fit are missing.
    ValueError
        The likelihood of the fit has no zero inflation.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata, batch_key="batch")
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.tl.get_technical_zeros(adata)
    >>> adata.layers["scvi_technical_zeros"].shape
    (700, 765)

    References
    ----------
    Lopez et al. (2018), Nature Methods 15, 1053; Clivio et al. (2019), bioRxiv 794875.
    """
    adata = adata.copy() if copy else adata
    fitted = Fitted.open(adata, key, indices)
    slot = fitted.slot("layers", fitted.keys.technical_zeros, key_added)
    module = fitted.module
    if not module.heads["zero_inflation"]:
        msg = (
            f"The likelihood of fit {fitted.fit.key!r} knows no technical zeros: a zero-inflated negative binomial "
            "('zinb') is needed. Name another fit: key=..."
        )
        raise ValueError(msg)

    def of_counts(cells: Minibatch, draws: Draws) -> tuple[torch.Tensor]:
        z = module.transform_z(module.encode(cells).loc)
        return (technical_zero_probability(cells.x.to_dense(), module.decode(z, cells)),)

    start = logg.info(f"computing which zeros are technical from fit {fitted.fit.key!r}")
    blocks = fitted.map(of_counts, batch_size=batch_size, seed=0)
    results.write_layers(adata, [slot], blocks, fitted.rows, fitted.columns)
    logg.info("    finished", time=start, deep=f"added\n    {slot!r}, probability of a technical zero (adata.layers)")
    return adata if copy else None
