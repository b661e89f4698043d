"""The names, arguments, defaults and shapes of scVI 0.5.0, kept by the torch classes."""

from __future__ import annotations

import inspect

import pytest
import torch
from _tolerances import FLOAT32, N_STANDARD_ERRORS
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from scvi_ext import models
from scvi_ext._contract import Minibatch
from scvi_ext.functional.divergences import kl_standard_normal

REQUIRED = inspect.Parameter.empty
VAE_ARGUMENTS = {
    "n_input": REQUIRED,
    "n_batch": 0,
    "n_labels": 0,
    "n_hidden": 128,
    "n_latent": 10,
    "n_layers": 1,
    "dropout_rate": 0.1,
    "dispersion": "gene",
    "log_variational": True,
    "reconstruction_loss": "zinb",
}
NETWORK = {"n_cat_list": None, "n_layers": 1, "n_hidden": 128}
CALLABLES = {
    "VAE": VAE_ARGUMENTS,
    "LDVAE": VAE_ARGUMENTS,
    "FCLayers": {
        "n_in": REQUIRED,
        "n_out": REQUIRED,
        "n_cat_list": None,
        "n_layers": 1,
        "n_hidden": 128,
        "dropout_rate": 0.1,
        "use_batch_norm": True,
        "use_relu": True,
        "bias": True,
    },
    "Encoder": {"n_input": REQUIRED, "n_output": REQUIRED} | NETWORK | {"dropout_rate": 0.1},
    "Decoder": {"n_input": REQUIRED, "n_output": REQUIRED} | NETWORK,
    "DecoderSCVI": {"n_input": REQUIRED, "n_output": REQUIRED} | NETWORK,
    "LinearDecoderSCVI": {"n_input": REQUIRED, "n_output": REQUIRED} | NETWORK,
    "EncoderTOTALVI": {
        "n_input": REQUIRED,
        "n_output": REQUIRED,
        "n_cat_list": None,
        "n_layers": 2,
        "n_hidden": 256,
        "dropout_rate": 0.1,
        "distribution": "ln",
    },
    "DecoderTOTALVI": {
        "n_input": REQUIRED,
        "n_output_genes": REQUIRED,
        "n_output_proteins": REQUIRED,
        "n_cat_list": None,
        "n_layers": 1,
        "n_hidden": 256,
        "dropout_rate": 0,
    },
    "compute_elbo": {"vae": REQUIRED, "posterior": REQUIRED},
    "compute_reconstruction_error": {"vae": REQUIRED, "posterior": REQUIRED},
    "compute_marginal_log_likelihood_autozi": {"autozivae": REQUIRED, "posterior": REQUIRED, "n_samples_mc": 100},
    "compute_marginal_log_likelihood_scvi": {"vae": REQUIRED, "posterior": REQUIRED, "n_samples_mc": 100},
    "log_nb_positive": {"x": REQUIRED, "mu": REQUIRED, "theta": REQUIRED, "eps": 1e-8},
    "log_zinb_positive": {"x": REQUIRED, "mu": REQUIRED, "theta": REQUIRED, "pi": REQUIRED, "eps": 1e-8},
    "log_mixture_nb": dict.fromkeys(["x", "mu_1", "mu_2", "theta_1", "theta_2", "pi"], REQUIRED) | {"eps": 1e-8},
    "logsumexp": {"input": REQUIRED, "dim": REQUIRED, "keepdim": False, "out": None},
    "reparameterize_gaussian": {"mu": REQUIRED, "var": REQUIRED},
    "one_hot": {"index": REQUIRED, "n_cat": REQUIRED},
    "enumerate_discrete": {"x": REQUIRED, "y_dim": REQUIRED},
    "iterate": {"obj": REQUIRED, "func": REQUIRED},
}
METHODS = {
    "get_latents": {"x": REQUIRED, "y": None},
    "sample_from_posterior_z": {"x": REQUIRED, "y": None, "give_mean": False},
    "sample_from_posterior_l": {"x": REQUIRED},
    "get_sample_scale": {"x": REQUIRED, "batch_index": None, "y": None, "n_samples": 1},
    "get_sample_rate": {"x": REQUIRED, "batch_index": None, "y": None, "n_samples": 1},
    "scale_from_z": {"sample_batch": REQUIRED, "fixed_batch": REQUIRED},
    "inference": {"x": REQUIRED, "batch_index": None, "y": None, "n_samples": 1},
    "get_reconstruction_loss": {"x": REQUIRED, "px_rate": REQUIRED, "px_r": REQUIRED, "px_dropout": REQUIRED},
}
B, G, L, K, C = 12, 7, 3, 3, 2
SEED_CLASSES = pytest.mark.parametrize("seed_class", [models.VAE, models.LDVAE])


def positional(function) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"}


def starts_with(function, expected: dict[str, object]) -> bool:
    """Further arguments may follow those of the seed if they have a default."""
    found = list(positional(function).items())
    return found[: len(expected)] == list(expected.items()) and REQUIRED not in dict(found[len(expected) :]).values()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def x() -> Tensor:
    return torch.poisson(torch.full((B, G), 3.0))


@pytest.fixture
def batch_index() -> Tensor:
    return (torch.arange(B) % K).unsqueeze(1)


@pytest.fixture
def y() -> Tensor:
    return (torch.arange(B) % C).unsqueeze(1)


def make(seed_class, **options):
    prior = {"library_log_means": (2.0, 2.5, 3.0), "library_log_vars": (0.2, 0.3, 0.4)}
    return seed_class(G, K, C, n_hidden=8, n_latent=L, **prior | options).eval()


# ---- names and arguments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert inspect.getdoc(getattr(models, name))


@pytest.mark.parametrize("name", CALLABLES)
def test_arguments_and_defaults_of_the_seed(name):
    assert name in models.__all__
    assert positional(getattr(models, name)) == CALLABLES[name]


def test_broadcast_labels_takes_any_number_of_tensors():
    parameters = inspect.signature(models.broadcast_labels).parameters
    assert list(parameters) == ["y", "o", "n_broadcast"]
    assert parameters["o"].kind is inspect.Parameter.VAR_POSITIONAL
    assert parameters["n_broadcast"].default == -1


@SEED_CLASSES
@pytest.mark.parametrize("method", METHODS)
def test_methods_of_the_seed(seed_class, method):
    assert starts_with(getattr(seed_class, method), METHODS[method])


@SEED_CLASSES
def test_forward_of_the_seed(seed_class):
    # The prior may be left out here, because the module holds one.
    assert list(positional(seed_class.forward)) == ["x", "local_l_mean", "local_l_var", "batch_index", "y"]


@SEED_CLASSES
def test_the_seeds_model_has_a_latent_library(seed_class):
    module = seed_class(G)
    assert type(module.library).__name__ == "LatentLibrary"


def test_forward_of_layers_takes_an_instance_id():
    parameters = inspect.signature(models.FCLayers.forward).parameters
    assert parameters["instance_id"].default == 0
    assert parameters["cat_list"].kind is inspect.Parameter.VAR_POSITIONAL


# ---- posteriors ------------------------------------------------------------------------------------------------------


@SEED_CLASSES
def test_get_latents_is_a_list_of_one_sample(seed_class, x):
    module = make(seed_class)
    torch.manual_seed(5)
    latents = module.get_latents(x)
    torch.manual_seed(5)
    assert isinstance(latents, list)
    assert len(latents) == 1
    assert torch.equal(latents[0], module.sample_from_posterior_z(x))
    assert latents[0].shape == (B, L)


@SEED_CLASSES
def test_sample_or_mean_of_z(seed_class, x):
    module = make(seed_class).requires_grad_(False)
    mean = module.sample_from_posterior_z(x, give_mean=True)
    inferred = module.inference(x, torch.zeros(B, dtype=torch.long))
    assert torch.equal(mean, inferred["qz_m"])
    samples = torch.stack([module.sample_from_posterior_z(x) for _ in range(400)])
    standard_error = torch.sqrt(inferred["qz_v"] / 400)
    assert ((samples.mean(0) - mean).abs() < N_STANDARD_ERRORS * standard_error).all()
    assert_close(samples.var(0).mean(), inferred["qz_v"].mean(), rtol=0.1, atol=0.0)  # 14,400 draws: 1.2 % each


@SEED_CLASSES
def test_mean_of_a_logistic_normal(seed_class, x):
    module = make(seed_class, latent_distribution="ln").requires_grad_(False)
    mean, sample = module.sample_from_posterior_z(x, give_mean=True), module.sample_from_posterior_z(x)
    for z in (mean, sample):
        assert_close(z.sum(-1), torch.ones(B), **FLOAT32)
    samples = torch.stack([module.sample_from_posterior_z(x) for _ in range(400)])
    # The mean is of 5000 draws, so its own error is small beside that of 400.
    standard_error = samples.std(0) * (1 / 400 + 1 / 5000) ** 0.5
    assert ((samples.mean(0) - mean).abs() < N_STANDARD_ERRORS * standard_error).all()


@SEED_CLASSES
def test_sample_of_the_log_library(seed_class, x):
    latent, observed = make(seed_class).requires_grad_(False), make(seed_class, library="observed")
    assert latent.sample_from_posterior_l(x).shape == (B, 1)
    assert not torch.equal(latent.sample_from_posterior_l(x), latent.sample_from_posterior_l(x))
    assert_close(observed.sample_from_posterior_l(x), torch.log(x.sum(1, keepdim=True)), **FLOAT32)


# ---- inference -------------------------------------------------------------------------------------------------------


@SEED_CLASSES
@pytest.mark.parametrize("n_samples", [1, 3])
@pytest.mark.parametrize("library", ["latent", "observed"])
@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-label", "gene-cell"])
def test_inference(seed_class, x, batch_index, y, n_samples, library, dispersion):
    found = make(seed_class, library=library, dispersion=dispersion).inference(x, batch_index, y, n_samples)
    lead = () if n_samples == 1 else (n_samples,)
    expected = {
        "px_scale": (*lead, B, G),
        "px_r": {"gene": (G,), "gene-cell": (*lead, B, G)}.get(dispersion, (B, G)),
        "px_rate": (*lead, B, G),
        "px_dropout": (*lead, B, G),
        "qz_m": (B, L),
        "qz_v": (B, L),
        "z": (*lead, B, L),
        "ql_m": None if library == "observed" else (B, 1),
        "ql_v": None if library == "observed" else (B, 1),
        "library": (*lead, B, 1),
    }
    assert {key: None if value is None else tuple(value.shape) for key, value in found.items()} == expected
    assert_close(found["px_rate"], torch.exp(found["library"]) * found["px_scale"], **FLOAT32)
    if n_samples > 1:
        assert not torch.equal(found["z"][0], found["z"][1])
        assert torch.equal(found["library"][0], found["library"][1]) == (library == "observed")


@SEED_CLASSES
def test_inference_without_dispersion_or_dropout(seed_class, x, batch_index):
    found = make(seed_class, reconstruction_loss="poisson").inference(x, batch_index)
    assert found["px_r"] is None
    assert found["px_dropout"] is None


@SEED_CLASSES
@pytest.mark.parametrize("n_samples", [1, 3])
def test_sample_scale_and_rate_are_those_of_inference(seed_class, x, batch_index, n_samples):
    module = make(seed_class)
    for method, key in [(module.get_sample_scale, "px_scale"), (module.get_sample_rate, "px_rate")]:
        for transform_batch in (None, 1):
            torch.manual_seed(3)
            found = method(x, batch_index, n_samples=n_samples, transform_batch=transform_batch)
            torch.manual_seed(3)
            assert torch.equal(found, module.inference(x, batch_index, None, n_samples, transform_batch)[key])


@SEED_CLASSES
def test_transform_batch_is_a_counterfactual(seed_class, x, batch_index):
    module = make(seed_class, dispersion="gene-batch")
    torch.nn.init.normal_(module.dispersion.log_theta)  # they start equal in all batches

    def at(index: Tensor | None, transform_batch: int | None) -> dict[str, Tensor]:
        torch.manual_seed(3)
        return module.inference(x, index, transform_batch=transform_batch)

    own, first = at(batch_index, None), at(batch_index, 0)
    in_first = batch_index.squeeze() == 0
    for key in ("px_scale", "px_rate", "px_r", "px_dropout"):
        assert torch.equal(first[key][in_first], own[key][in_first])
        assert not torch.equal(first[key][~in_first], own[key][~in_first])
    for key in ("qz_m", "ql_m", "library"):  # the cell was seen in its own batch
        assert torch.equal(first[key], own[key])
    # The batch of the cells is not needed where they are neither encoded nor decoded in it.
    assert torch.equal(at(None, 0)["px_rate"], first["px_rate"])


@SEED_CLASSES
@pytest.mark.parametrize("dispersion", ["gene", "gene-label", "gene-cell"])
def test_scale_from_z_is_the_scale_in_a_fixed_batch(seed_class, x, batch_index, y, dispersion):
    module = make(seed_class, dispersion=dispersion)
    torch.manual_seed(3)
    found = module.scale_from_z(x, 2)
    torch.manual_seed(3)
    assert torch.equal(found, module.inference(x, batch_index, y, transform_batch=2)["px_scale"])


# ---- loss ------------------------------------------------------------------------------------------------------------


@SEED_CLASSES
@pytest.mark.parametrize("reconstruction_loss", ["zinb", "nb", "poisson", "normal", "bernoulli"])
def test_reconstruction_loss_is_that_of_the_decoded_parameters(seed_class, x, batch_index, reconstruction_loss):
    module = make(seed_class, reconstruction_loss=reconstruction_loss)
    found = module.inference(x, batch_index)
    loss = module.get_reconstruction_loss(x, found["px_rate"], found["px_r"], found["px_dropout"])
    assert loss.shape == (B,)
    if reconstruction_loss == "zinb":
        log_p = models.log_zinb_positive(x, found["px_rate"], found["px_r"], found["px_dropout"])
        assert torch.equal(loss, -log_p.sum(-1))
    if reconstruction_loss == "nb":
        assert torch.equal(loss, -models.log_nb_positive(x, found["px_rate"], found["px_r"]).sum(-1))


@SEED_CLASSES
@pytest.mark.parametrize("library", ["latent", "observed"])
def test_forward_gives_three_slots_that_add_up_to_the_loss(seed_class, x, batch_index, y, library):
    module = make(seed_class, library=library, dispersion="gene-label")
    torch.manual_seed(3)
    local, annealed, global_ = module(x, batch_index=batch_index, y=y)
    cells = Minibatch(x, batch_index.squeeze(1), y.squeeze(1))
    torch.manual_seed(3)
    loss = module.loss(cells, kl_weight=0.3)
    assert local.shape == annealed.shape == (B,)
    assert global_.shape == ()
    assert torch.equal(local, loss.reconstruction + loss.kl_library)
    assert torch.equal(annealed, loss.kl_z)
    assert global_ == 0
    assert_close((local + 0.3 * annealed).mean() + global_, loss.total, **FLOAT32)
    assert torch.equal(annealed, kl_standard_normal(module.encode(cells)))


@SEED_CLASSES
@pytest.mark.parametrize("shape", [(B, 1), (B,)])
def test_forward_takes_another_prior_of_the_library(seed_class, x, batch_index, shape):
    module = make(seed_class)
    mean, var = torch.full((B, 1), 1.7), torch.linspace(0.1, 2.0, B).unsqueeze(1)
    local = []
    for prior in [(None, None), (mean.reshape(shape), var.reshape(shape))]:
        torch.manual_seed(3)
        local.append(module(x, *prior, batch_index)[0])
    cells = Minibatch(x, batch_index.squeeze(1))
    ql, held = module.encode_library(cells), module.library.prior(cells)
    expected = kl_divergence(Normal(*ql), Normal(mean, torch.sqrt(var))) - kl_divergence(Normal(*ql), Normal(*held))
    assert_close(local[1] - local[0], expected.squeeze(1), rtol=1e-4, atol=1e-4)  # a float32 difference of losses of 20
    without = make(seed_class, library_log_means=(), library_log_vars=())
    assert without(x, mean, var, batch_index)[0].isfinite().all()


# ---- what is missing is said -----------------------------------------------------------------------------------------


@SEED_CLASSES
@pytest.mark.parametrize("given", [(True, False), (False, True), (True, True)])
def test_half_a_prior_or_one_without_use(seed_class, x, batch_index, given):
    library = "observed" if all(given) else "latent"
    prior = [torch.ones(B, 1) if g else None for g in given]
    with pytest.raises(ValueError, match="are the prior of a latent library: give both, and only to a module"):
        make(seed_class, library=library)(x, *prior, batch_index)


@SEED_CLASSES
def test_batches_must_be_given_where_they_matter(seed_class, x, batch_index):
    module = make(seed_class)
    for call in (module.inference, module.get_sample_scale, module.get_sample_rate, module.forward):
        with pytest.raises(ValueError, match=r"The batch of each cell is needed \(n_batch=3\): give batch_index"):
            call(x)
    encoding = make(seed_class, encode_covariates=True)
    for call in (encoding.get_latents, encoding.sample_from_posterior_l, lambda x: encoding.scale_from_z(x, 0)):
        with pytest.raises(ValueError, match="The batch of each cell is needed"):
            call(x)
    assert encoding.inference(x, batch_index)["z"].shape == (B, L)
    assert seed_class(G).eval().inference(x)["z"].shape == (B, 10)


@SEED_CLASSES
@pytest.mark.parametrize("batch", [-1, K])
def test_there_is_no_such_batch(seed_class, x, batch_index, batch):
    module = make(seed_class, dispersion="gene-batch")
    message = rf"There is no batch {batch}: the module knows 0 to 2\."
    with pytest.raises(ValueError, match=message):
        module.scale_from_z(x, batch)
    with pytest.raises(ValueError, match=message):
        module.get_sample_scale(x, batch_index, transform_batch=batch)


@SEED_CLASSES
def test_labels_must_be_given_where_they_matter(seed_class, x, batch_index):
    with pytest.raises(ValueError, match="dispersion='gene-label' needs the label of each cell"):
        make(seed_class, dispersion="gene-label").inference(x, batch_index)


@SEED_CLASSES
@pytest.mark.parametrize("options", [{"n_cats_per_cov": (2,)}, {"n_continuous_cov": 1}, {"library": "size_factor"}])
def test_covariates_need_a_minibatch(seed_class, x, batch_index, options):
    with pytest.raises(ValueError, match="This module has covariates or size factors: call encode, decode and loss"):
        make(seed_class, **options).inference(x, batch_index)
