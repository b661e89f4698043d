"""The loss of scVI and all its gradients without autograd: networks of one hidden layer, trained on the processor.

Beside its large products a step consists of much that is small, and by operations of torch and nodes of autograd takes
longer to call than to do. So the way forwards through encoder, latent variable and decoder, and the way back, are
written out here: what :mod:`scvi_ext.kernels` has for each part, and its gradients in reverse. With the same random
draws it says what :class:`~scvi_ext.nn.encoders.Encoder`, :class:`~scvi_ext.nn.decoders.DecoderSCVI` and
:mod:`scvi_ext.functional.fused` say in turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from scvi_ext.functional import products
from scvi_ext.kernels import critic, sparse
from scvi_ext.kernels.inner import Inner, takes
from scvi_ext.nn.encoders import MAX_LOG_VAR, VAR_EPS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from scvi_ext.kernels.sparse import SparseRows
    from scvi_ext.nn.classifier import Classifier
    from scvi_ext.nn.decoders import DecoderSCVI
    from scvi_ext.nn.encoders import Encoder
    from scvi_ext.nn.layers import FCLayers


def fits(encoder: Encoder, decoder: DecoderSCVI, n_cells: int) -> bool:
    """Whether the networks have the form that is written out, the defaults of scVI, and this is for so many cells."""
    networks = encoder.encoder, decoder.px_decoder
    if any(encoder.encoder.n_cat_list) or decoder.px_r_decoder is not None or not all(map(_is_plain, networks)):
        return False
    parameters = [*encoder.parameters(), *decoder.parameters()]
    on_host = all(p.is_cpu and p.dtype == torch.float32 for p in parameters)
    norms = [network.layers[0].batch_norm[0] for network in networks]
    in_training = all(network.layers[0].training for network in networks)
    return on_host and in_training and takes(n_cells, norms, encoder.mean_encoder.out_features)


def _is_plain(layers: FCLayers) -> bool:
    """Whether it is one layer, with biases and what :mod:`scvi_ext.kernels.hidden` has a kernel for."""
    layer = layers.layers[0]
    return len(layers.layers) == 1 and layer.has_kernel and layer.linear.bias is not None


class AtOnce:
    """-log p(x | z) and KL(q(z | x) || N(0, I)) of each cell, and the gradients of their weighted mean.

    For minibatches of one size and networks that :func:`fits`, whose parameters stay where they are. What a call
    returns lies where the next one writes.

    Parameters
    ----------
    run
        A kernel of :func:`~scvi_ext.functional.fused.choose`.
    encoder, decoder
        The networks.
    n_cells
        Of a minibatch.
    """

    def __init__(self, run: Callable, encoder: Encoder, decoder: DecoderSCVI, n_cells: int):
        into, out = encoder.encoder.layers[0], decoder.px_decoder.layers[0]
        self.run, self.softmax, self.first = run, decoder.softmax, into.linear
        self.seen = [i for i, n in enumerate(decoder.px_decoder.n_cat_list) if n > 1]
        self.inner = Inner(
            n_cells,
            (into.batch_norm[0], out.batch_norm[0]),
            (into.dropout_rate, out.dropout_rate),
            encoder.mean_encoder,
            encoder.var_encoder,
            out.linear,
            [decoder.px_decoder.n_cat_list[i] for i in self.seen],
            MAX_LOG_VAR,
            VAR_EPS,
        )
        # A bias before a normalisation has no gradient: what it adds is taken off.
        self.d_first_bias = torch.zeros_like(into.linear.bias)
        self.heads = [head for head in (decoder.px_scale_decoder, decoder.px_dropout_decoder) if head is not None]

    def __call__(
        self,
        x: SparseRows,
        encoded: SparseRows,
        codes: Sequence[Tensor],
        kl_weight: float,
        log_library: Tensor,
        log_theta: Tensor | None,
        pull: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """-log p(x | z) and the divergence of each cell, (B,), and the gradient by log theta where there is one.

        All parameters of the networks are given their gradients. That by log theta has a row for each cell, or where
        all cells have the same, a few that add up to it.

        Parameters
        ----------
        x, encoded
            Counts of B cells, and what the encoder is shown of them.
        codes
            Of the categorical covariates, (B,) each.
        kl_weight
            Of the divergence in what is minimised.
        log_library
            Shape (B, 1).
        log_theta
            Shape (G,) or (B, G), where the likelihood has it.
        pull
            From the sample z to the gradient by it, (B, L), of whatever else is minimised.
        """
        first, inner, heads = self.first, self.inner, self.heads
        encoded.refuse_others(first.weight)
        if len(x) != len(inner.sample):
            msg = f"This was made for minibatches of {len(inner.sample)} cells, and this one has {len(x)}."
            raise ValueError(msg)
        if encoded.multiply_sparse:
            h, shown = sparse.linear_once(encoded, first.weight, first.bias), None
        else:
            h, *shown = products.linear_once(encoded.to_dense(), first.weight, first.bias)
        inner.forwards(h.numpy(), [codes[i].numpy() for i in self.seen], torch.Tensor.normal_)
        made = [products.linear_once(inner.h, head.weight, head.bias) for head in heads]
        outputs, multiplied = [output for output, *_ in made], [inputs for _, *inputs in made]
        summed = log_theta is not None and log_theta.dim() == 1
        log_p, d_logits, _, d_theta, d_dropout = self.run(
            x, self.softmax, outputs[0], log_library.flatten(), log_theta, *outputs[1:] or [None], -1 / len(h), True,
            summed=summed,
        )  # fmt: skip
        d_z = None if pull is None else pull(inner.sample).numpy()

        d_h = []
        for head, inputs, d_output in zip(heads, multiplied, (d_logits, d_dropout), strict=False):
            head.weight.grad = None  # so that the next one may lie in the same memory
            d_through, head.weight.grad, head.bias.grad = products.gradients(*inputs, d_output, (True, True, True))
            d_h.append(d_through.numpy())
        inner.backwards(d_h, d_z, kl_weight / len(h))
        first.weight.grad = None
        if shown is None:
            first.weight.grad = sparse.gradient_of_weight(encoded, inner.gradient)
        else:
            _, first.weight.grad, _ = products.gradients(*shown, inner.gradient, (False, True, False))
        for parameter, gradient in (*inner.gradients, (first.bias, self.d_first_bias)):
            parameter.grad = gradient
        return log_p.neg_(), inner.divergence, d_theta


class Mixing:
    """The gradients of :func:`~scvi_ext.functional.adversary.mixing_loss`, of a critic of linear layers and ReLU."""

    def __init__(self, network: Classifier):
        self.layers = [*(layer.linear for layer in network.hidden.layers), network.output]

    def gradient(self, classes: Tensor, weight: float, z: Tensor) -> Tensor:
        """By z (B, L); the critic is given its own. ``classes`` are codes (B,), ``weight`` that of mixing."""
        inputs = [z]
        for layer in self.layers[:-1]:
            inputs.append(torch.addmm(layer.bias, inputs[-1], layer.weight.t()).relu_())
        logits = torch.addmm(self.layers[-1].bias, inputs[-1], self.layers[-1].weight.t())
        d = critic.pulls(logits, classes, weight)  # the critic's own, and behind it what z is pulled by
        for layer, x in zip(reversed(self.layers), reversed(inputs), strict=True):
            own = d[: len(z)]
            layer.weight.grad, layer.bias.grad = own.t() @ x, own.sum(0)
            d = (d[len(z) :] if x is z else d) @ layer.weight
            if x is not z:
                critic.through_relu(x, d)
        return d
