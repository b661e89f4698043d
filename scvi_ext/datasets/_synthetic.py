"""Synthetic counts with planted truth, after the four synthetic datasets of scVI 0.5."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.sparse import csr_matrix

from scvi_ext._errors import number, whole_number


def synthetic_iid(
    *,
    n_cells_batch: int = 200,
    n_genes: int = 100,
    n_proteins: int = 100,
    n_batches: int = 2,
    n_labels: int = 3,
    seed: int = 0,
) -> AnnData:
    r"""Draw counts without any structure: the same law for every cell and gene, whatever the batch and the label.

    .. math::

        x_{cg} = w_{cg} m_{cg}, \quad w_{cg} \sim \mathrm{NB}(\text{mean } 35/3, \theta = 5), \quad
        m_{cg} \sim \mathrm{Bernoulli}(0.7)

    Labels are uniform, protein counts follow the law of :math:`w`, and all are independent. A model should find
    neither batches nor labels here.

    Parameters
    ----------
    n_cells_batch
        Cells in each batch.
    n_genes, n_proteins, n_batches, n_labels
        Sizes. Without proteins (0), ``obsm`` stays empty.
    seed
        Of a generator of its own; numpy's global one is left alone.

    Returns
    -------
    AnnData of ``n_batches * n_cells_batch`` cells, batch after batch.

    ``X``
        Counts, CSR float32.
    ``obs["batch"]``, ``obs["labels"]``
        ``batch_0``, ... and ``label_0``, ..., categorical.
    ``obsm["protein_expression"]``
        Protein counts, DataFrame of int64 with columns ``protein_0``, ...
    ``var["rate"]``, ``var["theta"]``, ``var["dropout"]``
        Truth: mean and inverse dispersion of :math:`w`, probability of a technical zero; float64.
    ``layers["is_technical"]``
        Truth: where :math:`m = 0`, CSR bool. This includes entries that would have been zero anyway.

    Raises
    ------
    TypeError
        A size or parameter is no number of its kind.
    ValueError
        A size is too small.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.synthetic_iid()
    >>> adata.shape, adata.obsm["protein_expression"].shape
    ((400, 100), (400, 100))
    """
    _sizes(1, n_cells_batch=n_cells_batch, n_genes=n_genes, n_batches=n_batches, n_labels=n_labels)
    _sizes(0, n_proteins=n_proteins)
    rng = _rng(seed)
    theta, p, dropout = 5.0, 0.3, 0.3  # of scVI 0.5
    n_cells = n_batches * n_cells_batch

    is_technical = rng.random((n_cells, n_genes)) < dropout
    adata = _adata(np.where(is_technical, 0, rng.negative_binomial(theta, p, size=(n_cells, n_genes))))
    adata.obs["batch"] = _categorical("batch", np.repeat(np.arange(n_batches), n_cells_batch), n_batches)
    adata.obs["labels"] = _categorical("label", rng.integers(n_labels, size=n_cells), n_labels)
    adata.var["rate"], adata.var["theta"], adata.var["dropout"] = theta * (1 - p) / p, theta, dropout
    adata.layers["is_technical"] = csr_matrix(is_technical)
    if n_proteins:
        adata.obsm["protein_expression"] = pd.DataFrame(
            rng.negative_binomial(theta, p, size=(n_cells, n_proteins)),
            index=adata.obs_names,
            columns=_names("protein", n_proteins),
        )
    return adata


def synthetic_random(
    *,
    mu: float = 4.0,
    theta: float = 2.0,
    dropout: float = 0.7,
    n_cells: int = 2000,
    n_genes: int = 10,
    seed: int = 0,
) -> AnnData:
    r"""Draw zero-inflated negative binomial counts with the same three parameters everywhere.

    .. math::

        x_{cg} = w_{cg} m_{cg}, \quad w_{cg} \sim \mathrm{NB}(\text{mean } \mu, \theta), \quad
        m_{cg} \sim \mathrm{Bernoulli}(1 - \text{dropout})

    with variance :math:`\mu + \mu^2 / \theta` of :math:`w`. Cells without a single count are left out, as they would
    be from real data: 4.5 % with the defaults, practically none from 50 genes on. There is nothing to find, so this
    shows what a method makes of pure noise. scVI 0.5 shipped cluster labels that another method had found in it;
    they carry no truth and are not here.

    Parameters
    ----------
    mu
        Mean count before zero inflation, above 0.
    theta
        Inverse dispersion, above 0.
    dropout
        Probability of a technical zero, from 0 to below 1.
    n_cells, n_genes
        Sizes; ``n_cells`` before empty cells are left out.
    seed
        Of a generator of its own; numpy's global one is left alone.

    Returns
    -------
    AnnData of at most ``n_cells`` cells.

    ``X``
        Counts, CSR float32.
    ``var["rate"]``, ``var["theta"]``, ``var["dropout"]``
        Truth: ``mu``, ``theta`` and ``dropout``, float64.
    ``layers["is_technical"]``
        Truth: where :math:`m = 0`, CSR bool. This includes entries that would have been zero anyway.

    Raises
    ------
    TypeError
        A size or parameter is no number of its kind.
    ValueError
        A size or parameter is out of range, or no cell has a count.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.synthetic_random(dropout=0.2, n_genes=50)
    >>> adata.shape, float(adata.var["rate"].iloc[0])
    ((2000, 50), 4.0)
    """
    _sizes(1, n_cells=n_cells, n_genes=n_genes)
    _above_zero(mu=mu, theta=theta)
    _probability(dropout=dropout)
    rng = _rng(seed)

    is_technical = rng.random((n_cells, n_genes)) < dropout
    w = rng.negative_binomial(theta, theta / (theta + mu), size=(n_cells, n_genes))
    x = np.where(is_technical, 0, w)
    has_counts = x.any(axis=1)
    if not has_counts.any():
        msg = f"None of {n_cells} cells has a count: raise {mu=} or {n_genes=}, or lower {dropout=}."
        raise ValueError(msg)
    adata = _adata(x[has_counts])
    adata.var["rate"], adata.var["theta"], adata.var["dropout"] = float(mu), float(theta), float(dropout)
    adata.layers["is_technical"] = csr_matrix(is_technical[has_counts])
    return adata


def synthetic_corr(
    *,
    n_cells_cluster: int = 200,
    n_clusters: int = 3,
    n_genes_high: int = 25,
    n_overlap: int = 0,
    weight_high: float = 4e-2,
    weight_low: float = 1e-2,
    lam_0: float = 50.0,
    seed: int = 0,
) -> AnnData:
    r"""Draw Poisson counts of clusters that each have a block of highly expressed genes.

    Genes ``k * (n_genes_high - n_overlap)`` to ``k * (n_genes_high - n_overlap) + n_genes_high - 1`` are high in
    cluster :math:`k`; neighbouring clusters share ``n_overlap`` of them. There are
    ``n_clusters * (n_genes_high - n_overlap) + n_overlap`` genes. A cell of cluster :math:`k` has

    .. math::

        x_{cg} \sim \mathrm{Poisson}(\lambda_{kg}), \quad \lambda_{kg} = \lambda_0 \, v_{kg} / \textstyle\sum_h v_{kh}

    with :math:`v_{kg}` = ``weight_high`` for the genes that are high in :math:`k` and ``weight_low`` for the others.
    With the defaults that is 4/3 and 1/3 of a count.

    Parameters
    ----------
    n_cells_cluster, n_clusters
        Cells in each cluster, and clusters.
    n_genes_high
        Genes that are high in a cluster.
    n_overlap
        How many of them the next cluster shares, from 0 to ``n_genes_high - 1``.
    weight_high, weight_low
        Relative expression of high genes (above 0) and of the others (0 or more). Only their ratio matters.
    lam_0
        Expected total count of a cell.
    seed
        Of a generator of its own; numpy's global one is left alone.

    Returns
    -------
    AnnData of ``n_clusters * n_cells_cluster`` cells, cluster after cluster.

    ``X``
        Counts, CSR float32.
    ``obs["labels"]``
        Truth: the cluster, ``label_0``, ..., categorical.
    ``layers["rate"]``
        Truth: :math:`\lambda`, dense float32, every row sums to ``lam_0``.
    ``varm["is_high"]``
        Truth: DataFrame of bool with one column per label: the genes that are high in it.

    Raises
    ------
    TypeError
        A size or parameter is no number of its kind.
    ValueError
        A size or parameter is out of range.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.synthetic_corr(n_overlap=5)
    >>> adata.shape, adata.varm["is_high"].sum().tolist()
    ((600, 65), [25, 25, 25])
    """
    _sizes(1, n_cells_cluster=n_cells_cluster, n_clusters=n_clusters, n_genes_high=n_genes_high)
    _sizes(0, n_overlap=n_overlap)
    _at_least(0, weight_low=weight_low)
    _above_zero(weight_high=weight_high, lam_0=lam_0)
    if n_overlap >= n_genes_high:
        msg = f"{n_overlap=} is not below {n_genes_high=}: neighbouring clusters would be the same."
        raise ValueError(msg)

    step = n_genes_high - n_overlap
    first = step * np.arange(n_clusters)[:, None]
    gene = np.arange(n_clusters * step + n_overlap)
    is_high = (gene >= first) & (gene < first + n_genes_high)  # (clusters, genes)
    weights = np.where(is_high, weight_high, weight_low)
    labels = np.repeat(np.arange(n_clusters), n_cells_cluster)
    rate = (lam_0 * weights / weights.sum(axis=1, keepdims=True))[labels]

    adata = _adata(_rng(seed).poisson(rate))
    adata.obs["labels"] = _categorical("label", labels, n_clusters)
    adata.layers["rate"] = rate.astype(np.float32)
    adata.varm["is_high"] = pd.DataFrame(is_high.T, index=adata.var_names, columns=_names("label", n_clusters))
    return adata


def synthetic_zi_corr(
    *,
    dropout_coef_high: float = 0.05,
    dropout_coef_low: float = 0.08,
    lam_dropout_high: float = 0.0,
    lam_dropout_low: float = 0.0,
    n_cells_cluster: int = 200,
    n_clusters: int = 3,
    n_genes_high: int = 25,
    n_overlap: int = 0,
    weight_high: float = 4e-2,
    weight_low: float = 1e-2,
    lam_0: float = 50.0,
    seed: int = 0,
) -> AnnData:
    r"""Draw the counts of :func:`synthetic_corr`, with technical zeros.

    A count is set to zero with probability

    .. math::

        \pi_{cg} = a \exp(-b \lambda_{cg}^2)

    where :math:`a, b` are ``dropout_coef_high, lam_dropout_high`` for the genes that are high in the cluster of the
    cell, and ``dropout_coef_low, lam_dropout_low`` for the others. With the same seed, all other counts are those of
    :func:`synthetic_corr`. The truth tells technical zeros from biological ones.

    Parameters
    ----------
    dropout_coef_high, dropout_coef_low
        Probability of a technical zero at rate 0, from 0 to below 1.
    lam_dropout_high, lam_dropout_low
        How fast it falls with the squared rate, 0 or more. With 0 it is the same at every rate.
    n_cells_cluster, n_clusters, n_genes_high, n_overlap, weight_high, weight_low, lam_0
        As in :func:`synthetic_corr`.
    seed
        Of a generator of its own; numpy's global one is left alone.

    Returns
    -------
    AnnData as of :func:`synthetic_corr`, where ``X`` has technical zeros and ``layers["rate"]`` is the mean without
    them, and in addition:

    ``layers["is_technical"]``
        Truth: the entries set to zero, CSR bool. This includes entries that would have been zero anyway.
    ``layers["dropout"]``
        Truth: :math:`\pi`, dense float32.

    Raises
    ------
    TypeError
        A size or parameter is no number of its kind.
    ValueError
        A size or parameter is out of range.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.synthetic_zi_corr()
    >>> bool(adata.X[adata.layers["is_technical"].toarray()].any())
    False
    """
    _probability(dropout_coef_high=dropout_coef_high, dropout_coef_low=dropout_coef_low)
    _at_least(0, lam_dropout_high=lam_dropout_high, lam_dropout_low=lam_dropout_low)
    adata = synthetic_corr(
        n_cells_cluster=n_cells_cluster,
        n_clusters=n_clusters,
        n_genes_high=n_genes_high,
        n_overlap=n_overlap,
        weight_high=weight_high,
        weight_low=weight_low,
        lam_0=lam_0,
        seed=seed,
    )
    rate = adata.layers["rate"]
    is_high = adata.varm["is_high"].to_numpy().T[adata.obs["labels"].cat.codes]
    dropout = np.where(
        is_high,
        dropout_coef_high * np.exp(-lam_dropout_high * rate**2),
        dropout_coef_low * np.exp(-lam_dropout_low * rate**2),
    )
    rng = _rng(seed).spawn(1)[0]  # independent of the stream that drew the counts
    is_technical = rng.random(rate.shape) < dropout
    adata.X = csr_matrix(np.where(is_technical, np.float32(0), adata.X.toarray()))
    adata.layers["is_technical"] = csr_matrix(is_technical)
    adata.layers["dropout"] = dropout.astype(np.float32)
    return adata


def synthetic_cite(
    *,
    n_cells_batch: int = 300,
    n_genes: int = 100,
    n_proteins: int = 15,
    n_batches: int = 2,
    n_types: int = 4,
    n_missing: int = 0,
    seed: int = 0,
) -> AnnData:
    r"""Draw genes and proteins of the same cells, where every protein count is background or foreground.

    Cell types are uniform. Gene :math:`g` is three times as high in type :math:`g \bmod` ``n_types``, and every batch
    has factors of its own for the genes:

    .. math::

        x_{cg} \sim \mathrm{NB}(\text{mean } l_c \rho_{cg}, \theta = 5), \quad \log l_c \sim N(\log 500, 0.3^2), \quad
        \rho_{cg} \propto u_g 3^{[g \bmod n = k_c]} e^{0.3 v_{g,batch}}

    with :math:`u_g \sim \mathrm{Gamma}(2)` and standard normal :math:`v`. Protein :math:`t` is expressed by type
    :math:`t \bmod` ``n_types``, not by the one after it, and by any other with probability 1/4:

    .. math::

        f_{ct} \sim \mathrm{Bernoulli}(0.95 \text{ if the type of } c \text{ expresses } t \text{, else } 0.02), \quad
        \log \beta_{ct} \sim N(m_t + 0.5 w_{t,batch}, 0.3^2) \\
        y_{ct} \sim \mathrm{NB}(\text{mean } \alpha_t^{f_{ct}} \beta_{ct}, \theta = 10)

    with :math:`m` between log 3 and log 20, :math:`\alpha` between 5 and 20 (both log-uniform), standard normal
    :math:`w`.

    Parameters
    ----------
    n_cells_batch
        Cells in each batch.
    n_genes, n_proteins, n_batches, n_types
        Sizes; at least 2 cell types.
    n_missing
        How many proteins, the last ones, were not measured in the last batch and are zero there. The truth of them is
        there nevertheless, and all other counts stay the same.
    seed
        Of a generator of its own; numpy's global one is left alone.

    Returns
    -------
    AnnData of ``n_batches * n_cells_batch`` cells, batch after batch.

    ``X``
        Counts of genes, CSR float32.
    ``obs["batch"]``, ``obs["cell_type"]``
        ``batch_0``, ... and ``type_0``, ..., categorical.
    ``obsm["protein_expression"]``
        Protein counts, DataFrame of int64 with columns ``protein_0``, ...
    ``obsm["is_foreground"]``, ``obsm["background"]``, ``obsm["foreground"]``
        Truth, DataFrames: :math:`f` (bool), the mean counts :math:`\beta` of the background and
        :math:`\alpha \beta` of the foreground (float64).

    Raises
    ------
    TypeError
        A size or parameter is no number of its kind.
    ValueError
        A size is out of range.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.synthetic_cite(n_missing=5)
    >>> adata.shape, int((adata.obsm["protein_expression"][adata.obs["batch"] == "batch_1"] == 0).all().sum())
    ((600, 100), 5)
    """
    _sizes(1, n_cells_batch=n_cells_batch, n_genes=n_genes, n_proteins=n_proteins, n_batches=n_batches)
    _sizes(2, n_types=n_types)
    _sizes(0, n_missing=n_missing)
    if n_missing and (n_batches == 1 or n_missing > n_proteins):
        msg = f"{n_missing=} of {n_proteins=} cannot be missing in one of {n_batches=} and be measured in another."
        raise ValueError(msg)
    rng = _rng(seed)
    batch = np.repeat(np.arange(n_batches), n_cells_batch)
    n_cells = len(batch)
    cell_type = rng.integers(n_types, size=n_cells)

    is_marker = np.arange(n_genes) % n_types == np.arange(n_types)[:, None]  # (types, genes)
    weights = rng.gamma(2.0, size=n_genes) * np.where(is_marker, 3.0, 1.0)[cell_type]
    weights *= np.exp(0.3 * rng.standard_normal((n_batches, n_genes)))[batch]
    library = np.exp(rng.normal(np.log(500.0), 0.3, (n_cells, 1)))
    adata = _adata(_nb(rng, library * weights / weights.sum(axis=1, keepdims=True), 5.0))
    adata.obs["batch"] = _categorical("batch", batch, n_batches)
    adata.obs["cell_type"] = _categorical("type", cell_type, n_types)

    protein, kind = np.arange(n_proteins), np.arange(n_types)[:, None]
    by_chance = (rng.random((n_types, n_proteins)) < 0.25) & (kind != (protein + 1) % n_types)
    expresses = (kind == protein % n_types) | by_chance  # (types, proteins)
    is_foreground = rng.random((n_cells, n_proteins)) < np.where(expresses, 0.95, 0.02)[cell_type]
    level = rng.uniform(np.log(3.0), np.log(20.0), n_proteins) + 0.5 * rng.standard_normal((n_batches, n_proteins))
    background = np.exp(rng.normal(level[batch], 0.3))
    foreground = background * np.exp(rng.uniform(np.log(5.0), np.log(20.0), n_proteins))
    counts = _nb(rng, np.where(is_foreground, foreground, background), 10.0)
    counts[(batch == n_batches - 1)[:, None] & (protein >= n_proteins - n_missing)] = 0
    tables = {"protein_expression": counts, "is_foreground": is_foreground, "background": background}
    for name, values in {**tables, "foreground": foreground}.items():
        adata.obsm[name] = pd.DataFrame(values, index=adata.obs_names, columns=_names("protein", n_proteins))
    return adata


def synthetic_zero_inflated(
    *,
    n_cells_batch: int = 1000,
    n_genes: int = 200,
    n_batches: int = 1,
    n_types: int = 4,
    share: float = 0.5,
    least_dropout: float = 0.1,
    most_dropout: float = 0.6,
    by_batch: bool = False,
    seed: int = 0,
) -> AnnData:
    r"""Draw counts of cell types in which some genes have technical zeros, and others have none.

    Cell types :math:`k_c` are uniform, and every gene has a level in each of them:

    .. math::

        w_{cg} \sim \mathrm{NB}(\text{mean } l_c \mu_g e^{0.7 u_{g,k_c}}, \theta_g), \quad
        \log l_c \sim N(0, 0.3^2), \quad m_{cg} \sim \mathrm{Bernoulli}(1 - \pi_g), \quad x_{cg} = m_{cg} w_{cg}

    with :math:`\mu` between 0.5 and 20, :math:`\theta` between 1 and 10 (both log-uniform) and standard normal
    :math:`u`. The dropout :math:`\pi` is uniform between its bounds for inflated genes, and 0 for the others.

    Parameters
    ----------
    n_cells_batch
        Cells in each batch.
    n_genes, n_batches, n_types
        Sizes.
    share
        Of the genes that are inflated, from 0 to below 1. The number is rounded.
    least_dropout, most_dropout
        Bounds of the probability of a technical zero in an inflated gene, from 0 to below 1.
    by_batch
        Whether every batch has inflated genes of its own, or the first one's are those of all.
    seed
        Of a generator of its own; numpy's global one is left alone.

    Returns
    -------
    AnnData of ``n_batches * n_cells_batch`` cells, batch after batch.

    ``X``
        Counts, CSR float32.
    ``obs["batch"]``, ``obs["cell_type"]``
        ``batch_0``, ... and ``type_0``, ..., categorical.
    ``varm["dropout"]``
        Truth: :math:`\pi` of each batch, a DataFrame of genes x batches, float64. Above 0 where a gene is inflated.
    ``layers["rate"]``
        Truth: the mean of :math:`w`, dense float32.

    Raises
    ------
    TypeError
        A size or parameter is no number of its kind.
    ValueError
        A size or parameter is out of range.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.synthetic_zero_inflated(n_cells_batch=50, n_genes=20)
    >>> int((adata.varm["dropout"]["batch_0"] > 0).sum())
    10
    """
    _sizes(1, n_cells_batch=n_cells_batch, n_genes=n_genes, n_batches=n_batches, n_types=n_types)
    if not isinstance(by_batch, bool):
        raise TypeError(f"{by_batch=} is a {type(by_batch).__name__}; True or False is needed.")
    _probability(share=share, least_dropout=least_dropout, most_dropout=most_dropout)
    _at_least(least_dropout, most_dropout=most_dropout)
    rng = _rng(seed)
    batch = np.repeat(np.arange(n_batches), n_cells_batch)
    cell_type = rng.integers(n_types, size=len(batch))
    level = np.exp(rng.uniform(np.log(0.5), np.log(20.0), n_genes) + 0.7 * rng.standard_normal((n_types, n_genes)))
    theta = np.exp(rng.uniform(0.0, np.log(10.0), n_genes))
    rate = np.exp(0.3 * rng.standard_normal((len(batch), 1))) * level[cell_type]
    counts = _nb(rng, rate, theta)

    n_inflated = round(share * n_genes)
    dropout = np.zeros((n_batches, n_genes))
    for of_batch in dropout if by_batch else dropout[:1]:
        of_batch[rng.permutation(n_genes)[:n_inflated]] = rng.uniform(least_dropout, most_dropout, n_inflated)
    if not by_batch:
        dropout[1:] = dropout[0]
    counts[rng.random(counts.shape) < dropout[batch]] = 0
    adata = _adata(counts)
    adata.obs["batch"] = _categorical("batch", batch, n_batches)
    adata.obs["cell_type"] = _categorical("type", cell_type, n_types)
    adata.varm["dropout"] = pd.DataFrame(dropout.T, index=adata.var_names, columns=_names("batch", n_batches))
    adata.layers["rate"] = rate.astype(np.float32)
    return adata


def _nb(rng: np.random.Generator, mean: np.ndarray, theta: float | np.ndarray) -> np.ndarray:
    return rng.negative_binomial(theta, theta / (theta + mean))


def _adata(x: np.ndarray) -> AnnData:
    n_cells, n_genes = x.shape
    return AnnData(
        csr_matrix(x, dtype=np.float32),
        obs=pd.DataFrame(index=_names("cell", n_cells)),
        var=pd.DataFrame(index=_names("gene", n_genes)),
    )


def _names(stem: str, n: int) -> list[str]:
    return [f"{stem}_{i}" for i in range(n)]


def _categorical(stem: str, codes: np.ndarray, n: int) -> pd.Categorical:
    return pd.Categorical.from_codes(codes, categories=_names(stem, n))


def _rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(whole_number("seed", seed, least=0))


def _sizes(least: int, **values: int) -> None:
    for name, value in values.items():
        whole_number(name, value, least)


def _at_least(least: float, **values: float) -> None:
    for name, value in values.items():
        if not number(name, value) >= least:
            raise ValueError(f"{name}={value!r} is not at least {least}.")


def _above_zero(**values: float) -> None:
    for name, value in values.items():
        if not number(name, value) > 0:
            raise ValueError(f"{name}={value!r} is not above 0.")


def _probability(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= number(name, value) < 1:
            raise ValueError(f"{name}={value!r} is not a probability from 0 to below 1.")
