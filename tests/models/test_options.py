"""No option is ignored: every value of every option changes the module or its output, or is refused with a reason."""

from __future__ import annotations

import re
from dataclasses import asdict, replace

import pytest
import torch
from _small import (
    BARE,
    BESIDE,
    GENERATIVE,
    N_CELLS,
    SMALL,
    SUMMARY,
    all_measured,
    build,
    label,
    make_cells,
    named,
    offering,
    values,
)
from _tolerances import FLOAT64
from torch.testing import assert_close

from scvi_ext import models
from scvi_ext._contract import Capability

MODELS = pytest.mark.parametrize("name", GENERATIVE)
BAD_VALUES = [
    ("dispersion", "gene_batch", "'gene', 'gene-batch', 'gene-cell', 'gene-label'. Did you mean 'gene-batch'?"),
    ("reconstruction_loss", "zinbb", "'bernoulli', 'nb', 'normal', 'poisson', 'zinb'. Did you mean 'zinb'?"),
    ("latent_distribution", "lognormal", "'ln', 'normal'. Did you mean 'normal'?"),
    ("library", "size", "'latent', 'observed', 'size_factor'."),
    ("batch_representation", "onehot", "'embedding', 'one-hot'. Did you mean 'one-hot'?"),
    ("use_batch_norm", "all", "'both', 'decoder', 'encoder', 'none'."),
    ("use_layer_norm", "all", "'none'."),
    ("gene_dispersion", "gene_cell", "'gene', 'gene-batch', 'gene-label'. Did you mean 'gene-label'?"),
    ("protein_dispersion", "gene", "'protein', 'protein-batch', 'protein-label'."),
    ("reconstruction_loss_gene", "poisson", "'nb', 'zinb'."),
    ("protein_background", "empiric", "'empirical', 'learned'. Did you mean 'empirical'?"),
    ("adversarial_classifier", "yes", "'auto', 'off', 'on'."),
]
BAD_SIZES = [
    ({"n_layers": 0}, "n_layers=0 must be 1 or more."),
    ({"n_hidden": 0}, "n_hidden=0 must be 1 or more."),
    ({"n_latent": -1}, "n_latent=-1 must be 1 or more."),
    ({"dropout_rate": 1.0}, "dropout_rate=1.0 must be at least 0 and below 1."),
    ({"dropout_rate": -0.1}, "dropout_rate=-0.1 must be at least 0 and below 1."),
    ({"n_layers_encoder": 0}, "n_layers_encoder=0 must be 1 or more."),
    ({"dropout_rate_encoder": 1.0}, "dropout_rate_encoder=1.0 must be at least 0 and below 1."),
    ({"dropout_rate_decoder": -0.1}, "dropout_rate_decoder=-0.1 must be at least 0 and below 1."),
    ({"adversarial_mixing": -1.0}, "adversarial_mixing=-1.0 must be from 0 to 100."),
    ({"adversarial_mixing": float("inf")}, "adversarial_mixing=inf must be from 0 to 100."),
    ({"adversarial_mixing": float("nan")}, "adversarial_mixing=nan must be from 0 to 100."),
    ({"protein_weight": 0.0}, "protein_weight=0.0 must be positive and finite."),
    ({"protein_weight": float("inf")}, "protein_weight=inf must be positive and finite."),
]
NO_EFFECT = [
    (
        SUMMARY,
        {"dispersion": "gene-batch", "reconstruction_loss": "poisson"},
        "dispersion='gene-batch' has no effect: reconstruction_loss='poisson' has no dispersion.",
    ),
    (
        SUMMARY,
        {"dispersion": "gene-cell", "reconstruction_loss": "bernoulli"},
        "dispersion='gene-cell' has no effect: reconstruction_loss='bernoulli' has no dispersion.",
    ),
    (
        BARE,
        {"encode_covariates": True},
        "encode_covariates=True has no effect: there is one batch and no covariate to encode.",
    ),
    (
        SUMMARY,
        {"deeply_inject_covariates": False, "encode_covariates": True, "n_layers": 1},
        "deeply_inject_covariates=False has no effect with n_layers=1: covariates enter the first layer anyway.",
    ),
    (
        BARE,
        {"batch_representation": "embedding"},
        "batch_representation='embedding' has no effect: there is only one batch.",
    ),
    (
        SUMMARY,
        {"latent_distribution": "ln", "n_latent": 1},
        "latent_distribution='ln' leaves nothing to learn with n_latent=1: the softmax of one number is always 1.",
    ),
    (
        BARE,
        {"adversarial_mixing": 3.0},
        "adversarial_mixing=3.0 has no effect: there is one batch, and nothing to tell from it.",
    ),
    (
        BARE,
        {"adversarial_classifier": "on"},
        "adversarial_classifier='on' has no effect: there is one batch, and nothing to tell from it.",
    ),
]


def fingerprint(name: str, module: torch.nn.Module) -> tuple:
    """Shapes of the parameters, and loss and gradient of a training step: the same only if an option did nothing."""
    cells = make_cells()
    if Capability.LABELS in models.get(name).capabilities:  # which some of the cells may lack
        cells = cells._replace(labels=cells.labels.masked_fill(torch.arange(N_CELLS) % 2 == 0, -1))
    labelled = make_cells(seed=1)
    torch.manual_seed(1)
    loss = module.loss(*[cells, labelled][: len(models.get(name).streams)]).total
    loss.backward()
    steepness = sum(p.grad.abs().sum().item() for p in module.parameters() if p.grad is not None)
    return tuple((key, tuple(value.shape)) for key, value in module.state_dict().items()), loss.item(), steepness


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name in GENERATIVE for option in values(name)], ids=label
)
def test_every_value_has_an_effect(name, option):
    tried = values(name)[option]
    assert len(tried) > 1
    # What a value does may depend on whether all batches have measured all proteins.
    data = [SUMMARY, replace(SUMMARY, proteins=all_measured(SUMMARY.proteins.n_proteins, SUMMARY.n_batch))]
    chosen = [BESIDE.get(option, {}) | {option: value} for value in tried]
    found = {tuple(fingerprint(name, build(name, summary, **options)) for summary in data) for options in chosen}
    assert len(found) == len(tried)


@pytest.mark.parametrize(
    ("name", "option", "value", "choices"),
    [(name, *bad) for bad in BAD_VALUES for name in GENERATIVE if bad[0] in values(name)],
    ids=label,
)
def test_unknown_values_list_the_known(name, option, value, choices):
    with pytest.raises(ValueError, match=rf"^{option}='{value}' is not one of .*{re.escape(choices)}$"):
        build(name, **{option: value})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [(name, *bad) for bad in BAD_SIZES for name in GENERATIVE if bad[0].keys() <= values(name).keys()],
    ids=label,
)
def test_impossible_sizes(name, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build(name, **options)


def asked_for(name: str, options: dict) -> bool:
    """Whether the model has these options, and does not do without being asked what they say."""
    default = asdict(models.get(name).config(**SMALL))
    return options.keys() <= default.keys() and any(default[option] != value for option, value in options.items())


@pytest.mark.parametrize(
    ("name", "summary", "options", "message"),
    [(name, *case) for case in NO_EFFECT for name in GENERATIVE if asked_for(name, case[1])],
)
def test_options_without_effect(name, summary, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build(name, summary, **options)


@MODELS
def test_labels_are_needed_where_they_are_read(name):
    options = [named(name, dispersion="gene-label")]
    if "protein_dispersion" in values(name):
        options.append({"protein_dispersion": "protein-label"})
    for chosen in options:
        ((option, value),) = chosen.items()
        who = f"Model {name!r}" if Capability.LABELS in models.get(name).capabilities else f"{option}={value!r}"
        message = f"{who} needs labels: register them with pp.setup_anndata(adata, labels_key=...)."
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            build(name, replace(SUMMARY, n_labels=0), **chosen)


@pytest.mark.parametrize("name", offering(deeply_inject_covariates=False, batch_representation="embedding"))
@pytest.mark.parametrize("representation", ["one-hot", "embedding"])
def test_nothing_to_inject_deeply(name, representation):
    # An embedded batch is dense, so it enters the first layer only in any case.
    n_batch = 1 if representation == "one-hot" else 3
    with pytest.raises(ValueError, match="has no effect: there is no one-hot covariate to leave out of later layers"):
        models.get(name).module(
            5,
            n_batch=n_batch,
            n_labels=1,
            n_layers=2,
            n_continuous_cov=1,
            encode_covariates=True,
            deeply_inject_covariates=False,
            batch_representation=representation,
        )


def test_ldvae_injects_deeply_only_in_its_encoder():
    with pytest.raises(ValueError, match="has no effect without encode_covariates=True: the linear decoder"):
        build("ldvae", n_layers=2, deeply_inject_covariates=False)


@pytest.mark.parametrize("where", ["decoder", "both"])
def test_layer_norm_would_make_ldvae_nonlinear(where):
    with pytest.raises(ValueError, match=rf"^use_layer_norm='{where}' is not one of 'encoder', 'none'\."):
        build("ldvae", use_layer_norm=where)


@MODELS
def test_latent_library_needs_its_prior(name):
    cells, without = make_cells(BARE), replace(BARE, library_log_means=(), library_log_vars=())
    module = build(name, without, library="latent")
    with pytest.raises(ValueError, match="A latent library needs a prior: build the module with library_log_means and"):
        module.loss(cells)


@MODELS
def test_library_decides_the_scale_activation(name):
    cells, scales, state = make_cells(), {}, build(name, library="latent").state_dict()
    for library in ("observed", "latent", "size_factor"):
        module = build(name, library=library).eval()
        module.load_state_dict({key: value for key, value in state.items() if key in module.state_dict()})
        scales[library] = module.decode(module.encode(cells).loc, cells).scale
    assert torch.equal(scales["observed"], scales["latent"])
    assert not torch.equal(scales["observed"], scales["size_factor"])


LIKELIHOODS = [("zinb", True, True), ("nb", True, False), ("normal", True, False), ("poisson", False, False)]


@pytest.mark.parametrize(
    ("name", "reconstruction_loss", "has_theta", "has_dropout"),
    [(name, *case) for case in LIKELIHOODS for name in offering(reconstruction_loss=case[0])],
)
def test_parameters_of_counts_are_those_of_the_likelihood(name, reconstruction_loss, has_theta, has_dropout):
    module, cells = build(name, **named(name, reconstruction_loss=reconstruction_loss)).eval(), make_cells()
    px = module.decode(module.encode(cells).loc, cells)
    assert (px.theta is not None) == has_theta
    assert (px.dropout_logits is not None) == has_dropout


THETA = [
    ("gene", (SUMMARY.n_input,)),
    ("gene-batch", (N_CELLS, SUMMARY.n_input)),
    ("gene-label", (N_CELLS, SUMMARY.n_input)),
    ("gene-cell", (N_CELLS, SUMMARY.n_input)),
]


@pytest.mark.parametrize(
    ("name", "dispersion", "shape"), [(name, *case) for case in THETA for name in offering(dispersion=case[0])]
)
def test_theta_varies_with_what_the_dispersion_says(name, dispersion, shape):
    module, cells = build(name, **named(name, dispersion=dispersion)).eval(), make_cells()
    if dispersion != "gene-cell":
        assert (module.dispersion.log_theta == 0).all()  # it starts at one, for every gene
        torch.nn.init.normal_(module.dispersion.log_theta)
    theta = module.decode(module.encode(cells).loc, cells).theta
    assert theta.shape == shape
    assert (theta > 0).all()
    rows = {"gene": 1, "gene-batch": SUMMARY.n_batch, "gene-label": SUMMARY.n_labels, "gene-cell": N_CELLS}[dispersion]
    assert len(torch.unique(theta.reshape(-1, SUMMARY.n_input), dim=0)) == rows
    if dispersion == "gene-batch":
        assert len(torch.unique(theta[cells.batch_index == 1], dim=0)) == 1
    if dispersion == "gene-label":
        assert len(torch.unique(theta[cells.labels == 1], dim=0)) == 1


@MODELS
def test_logistic_normal_z_lies_on_the_simplex(name):
    module, cells = build(name, latent_distribution="ln").eval(), make_cells()
    qz = module.encode(cells)
    z = module.transform_z(qz.loc)
    assert (z > 0).all()
    assert_close(z.sum(-1), torch.ones(N_CELLS, dtype=torch.float64), **FLOAT64)
    noise = torch.randn(N_CELLS, 2000, module.n_latent, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = module.mean_z(qz, noise)
    expected = torch.softmax(qz.loc.unsqueeze(1) + qz.scale.unsqueeze(1) * noise, -1).mean(1)
    assert_close(mean, expected, **FLOAT64)
    assert (mean - z).abs().max() > 1e-3  # the mean of a softmax is not the softmax of a mean
