"""From counts to the parts of the ELBO as one node of autograd: networks of one hidden layer, on the processor.

Beside its large products a step consists of much that is small, and by autograd takes longer to call than to do. So the
way forwards through encoder, latent variable and decoder, and the way back, are written out here: what
:mod:`scvi_ext.kernels` has for each part, and its gradients in reverse. With the same random draws it says what
:class:`~scvi_ext.nn.encoders.Encoder`, :class:`~scvi_ext.nn.decoders.DecoderSCVI` and
:mod:`scvi_ext.functional.fused` say in turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.autograd.function import once_differentiable

from scvi_ext.functional import products, ranks
from scvi_ext.kernels import hidden, latent, sparse
from scvi_ext.nn.encoders import MAX_LOG_VAR, VAR_EPS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from scvi_ext.kernels.sparse import SparseRows
    from scvi_ext.nn.decoders import DecoderSCVI
    from scvi_ext.nn.encoders import Encoder
    from scvi_ext.nn.layers import FCLayers


def fits(encoder: Encoder, decoder: DecoderSCVI) -> bool:
    """Whether the networks have the form that is written out: the defaults of scVI."""
    encodes_covariates = any(encoder.encoder.n_cat_list)
    plain = _is_plain(encoder.encoder) and _is_plain(decoder.px_decoder)
    return plain and not encodes_covariates and decoder.px_r_decoder is None


def takes(encoder: Encoder, decoder: DecoderSCVI, x: Tensor | SparseRows) -> bool:
    """Whether they are trained here, by this process alone."""
    layers = encoder.encoder.layers[0], decoder.px_decoder.layers[0]
    if not (isinstance(x, sparse.SparseRows) and torch.is_grad_enabled() and ranks.current().n == 1):
        return False
    return all(layer.training and hidden.takes_cells(len(x), layer.batch_norm[0]) for layer in layers)


def negative_elbo(
    run: Callable,
    encoder: Encoder,
    decoder: DecoderSCVI,
    x: SparseRows,
    encoded: SparseRows,
    codes: Sequence[Tensor],
    kl_weight: Tensor | float,
    log_library: Tensor,
    log_theta: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is minimised, -log p(x | z) and KL(q(z | x) || N(0, I)) of each cell, and the sample z.

    Shapes (), (B,), (B,) and (B, L). Gradients flow through the first and the last, not through the parts.

    Parameters
    ----------
    run
        A kernel of :func:`~scvi_ext.functional.fused.choose`.
    encoder, decoder
        Networks that :func:`fits`.
    x, encoded
        Counts of B cells, and what the encoder is shown of them.
    codes
        Of the categorical covariates, (B,) each.
    kl_weight
        Of the divergence in what is minimised.
    log_library
        Shape (B, 1).
    log_theta
        Shape (G,) or (B, G), where the likelihood has it and the decoder has no head for it.
    """
    into, out = encoder.encoder.layers[0], decoder.px_decoder.layers[0]
    heads = [head for head in (decoder.px_scale_decoder, decoder.px_dropout_decoder) if head is not None]
    norms = into.batch_norm[0], out.batch_norm[0]
    layers = into.linear, norms[0], encoder.mean_encoder, encoder.var_encoder, out.linear, norms[1]
    parameters = [parameter for layer in (*layers, *heads) for parameter in (layer.weight, layer.bias)]
    known = [(code, n) for code, n in zip(codes, decoder.px_decoder.n_cat_list, strict=True) if n > 1]
    return _NegativeELBO.apply(
        run,
        norms,
        (into.dropout_rate, out.dropout_rate),
        decoder.softmax,
        x,
        encoded,
        known,
        kl_weight,
        log_library,
        log_theta,
        *parameters,
    )


def _is_plain(layers: FCLayers) -> bool:
    """Whether it is one layer, with biases and what :mod:`scvi_ext.kernels.hidden` has a kernel for."""
    layer = layers.layers[0]
    return len(layers.layers) == 1 and layer.has_kernel and layer.linear.bias is not None


class _NegativeELBO(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, run, norms, dropout_rates, softmax, x, encoded, codes, kl_weight, log_library, log_theta, *parameters
    ):
        w_in, b_in, _, _, w_mean, b_mean, w_var, b_var, w_out, b_out, _, _, *heads = parameters
        encoded.refuse_others(w_in)
        if encoded.multiply_sparse:
            h, shown = sparse.linear_once(encoded, w_in, b_in), None
        else:
            h, shown, _ = products.linear_once(encoded.to_dense(), w_in, b_in)
        h, ctx.into = hidden.activate_once(h, norms[0], dropout_rates[0])
        loc, scale, ctx.posterior = latent.posterior_once(h, w_mean, b_mean, w_var, b_var, MAX_LOG_VAR, VAR_EPS)
        noise = ranks.normal_like(loc)
        z = torch.addcmul(loc, scale, noise)
        beside = latent.beside(z, codes)
        h = torch.addmm(b_out, beside, w_out.t())
        h, ctx.out = hidden.activate_once(h, norms[1], dropout_rates[1])
        made = [products.linear_once(h, *head) for head in zip(heads[::2], heads[1::2], strict=True)]
        outputs, kept = [output for output, *_ in made], [t for _, *inputs in made for t in inputs]
        log_p, d_logits, _, d_theta, d_dropout = run(
            x, softmax, outputs[0], log_library.flatten(), log_theta, *outputs[1:] or [None], -1 / len(z), True
        )
        reconstruction, kl = log_p.neg_(), latent.divergence(loc, scale)
        ctx.kl_weight, ctx.encoded = float(kl_weight), encoded
        if log_theta is not None and log_theta.dim() == 1:
            d_theta = d_theta.sum(0)
        ctx.save_for_backward(shown, loc, scale, noise, beside, w_in, w_out, d_theta, d_logits, d_dropout, *kept)
        ctx.mark_non_differentiable(reconstruction, kl)
        return reconstruction.mean() + ctx.kl_weight * kl.mean(), reconstruction, kl, z

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total, _d_reconstruction, _d_kl, d_z):
        shown, loc, scale, noise, beside, w_in, w_out, *d_outputs = ctx.saved_tensors[:10]
        times = d_total.item()
        if times != 1:
            d_outputs = [None if d_output is None else d_output * times for d_output in d_outputs]
        d_theta, *d_outputs = d_outputs
        kept = zip(ctx.saved_tensors[10::2], ctx.saved_tensors[11::2], strict=True)
        d_h, d_heads = None, []
        for of_head, d_output in zip(kept, d_outputs, strict=False):  # None for a head that there is not
            d_through, *d_head = products.gradients(*of_head, d_output, (True, True, True))
            d_h = d_through if d_h is None else d_h.add_(d_through)
            d_heads += d_head
        d_h, *d_norm_out = hidden.activation_gradients(ctx.out, d_h)
        # A bias has no gradient: the normalisation takes off what it adds.
        d_out = d_h.t() @ beside, torch.zeros(d_h.shape[1])
        d_z = torch.addmm(d_z, d_h, w_out[:, : loc.shape[1]])
        d_loc, d_scale = latent.divergence_gradients(loc, scale, times * ctx.kl_weight / len(loc))
        d_h, *d_posterior = latent.posterior_gradients(ctx.posterior, d_loc.add_(d_z), d_scale.addcmul_(d_z, noise))
        d_h, *d_norm_in = hidden.activation_gradients(ctx.into, d_h)
        if shown is None:
            d_w_in = sparse.gradient_of_weight(ctx.encoded, d_h)
        else:
            _, d_w_in, _ = products.gradients(shown, w_in, d_h, (False, True, False))
        d_in = d_w_in, torch.zeros(d_h.shape[1])
        return *[None] * 9, d_theta, *d_in, *d_norm_in, *d_posterior, *d_out, *d_norm_out, *d_heads
