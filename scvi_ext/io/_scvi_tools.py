"""Read a model that was trained with scvi-tools."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.special import expit

from scvi_ext import models
from scvi_ext._contract import SavedFit
from scvi_ext._errors import listing, warn
from scvi_ext.data.joint import describe_genes
from scvi_ext.data.registry import Registry

from ._adopt import adopt, adopt_all, check_fit
from ._torch_archive import Record, read_torch_archive

if TYPE_CHECKING:
    from os import PathLike

    from anndata import AnnData

_FILE = "model.pt"
_MODELS = {
    "AUTOZI": "autozi",
    "GIMVI": "gimvi",
    "LinearSCVI": "ldvae",
    "SCANVI": "scanvi",
    "SCVI": "scvi",
    "TOTALVI": "totalvi",
}
_RENAMED_OPTIONS = {"gene_likelihood": "reconstruction_loss"}
_RENAMED_OPTIONS_OF_TOTALVI = {"gene_likelihood": "reconstruction_loss_gene", "n_layers_decoder": "n_layers"}
_ONLY_THERE = {"extra_payload_autotune"}  # changes what their training reports, not the model
# LinearSCVI hands these to a class whose encoder and decoder it then replaces by others that do not see them.
_WITHOUT_EFFECT_IF_LINEAR = {"encode_covariates", "deeply_inject_covariates", "use_layer_norm"}
# Handed to every SCANVI; without use_labels_groups, which has no counterpart here, it does nothing with it.
_WITHOUT_EFFECT_IF_SCANVI = {"labels_groups"}
# Where the background's prior started, and which zeros counted: the weights and the registry have it.
_KNOWN_IF_TOTALVI = {"empirical_protein_background_prior", "override_missing_proteins"}
_RENAMED_WEIGHTS = {
    r"^px_r$": "dispersion.log_theta",
    r"^l_encoder\.": "library.encoder.",
    r"^library_log_(means|vars)$": r"library.log_\1",
    r"^_embeddings_dict\.batch\.": "covariates.batch_embedding.",
    r"^y_prior$": "log_y_prior",
    r"^py_r$": "protein_dispersion.log_theta",
    r"^background_pro_alpha$": "background_mean",
    r"^background_pro_log_beta$": "background_log_scale",
    r"^log_per_batch_efficiency$": "log_efficiency",
    r"^encoder\.encoder\.": "z_encoder.encoder.",
    r"^encoder\.z_(mean|var)_encoder\.": r"z_encoder.\1_encoder.",
    r"^encoder\.l_gene_encoder\.": "library.encoder.encoder.",
    r"^encoder\.l_gene_(mean|var)_encoder\.": r"library.encoder.\1_encoder.",
    r"\.px_dropout_decoder_gene\.": ".px_dropout_decoder.",
    r"^classifier\.classifier\.0\.(?=fc_layers)": "classifier.hidden.",
    r"^classifier\.classifier\.\d\.": "classifier.output.",
    r"\.fc_layers\.Layer (\d+)\.0\.": r".layers.\1.linear.",
    r"\.fc_layers\.Layer (\d+)\.1\.": r".layers.\1.batch_norm.0.",
    r"\.px_scale_decoder\.0\.": ".px_scale_decoder.",
}
# Of their GIMVI and its module, all of them: what a model is here by default says nothing of one that was made there.
_DEFAULTS_OF_GIMVI = {
    "generative_distributions": ("zinb", "nb"),
    "model_library_size": (True, False),
    "n_latent": 10,
    "n_layers_encoder_individual": 1,
    "n_layers_encoder_shared": 1,
    "dim_hidden_encoder": 64,
    "n_layers_decoder_individual": 0,
    "n_layers_decoder_shared": 0,
    "dim_hidden_decoder_individual": 64,
    "dim_hidden_decoder_shared": 64,
    "dropout_rate_encoder": 0.2,
    "dropout_rate_decoder": 0.2,
    "dispersion": "gene-batch",
    "log_variational": True,
}
_DATASETS_OF_GIMVI = ("seq", "spatial")
_RENAMED_WEIGHTS_OF_GIMVI = {
    r"^l_encoders\.(\d+)\.": r"libraries.\1.encoder.",
    r"^library_log_(means|vars)_(\d+)$": r"libraries.\2.log_\1",
    r"^z_encoder\.": "encoder.",
}
# With one batch normalisation there, and one for each data set here.
_SHARED_IN_GIMVI = ("encoder.encoder_shared.", "decoder.px_decoder_conditioned.", "decoder.px_decoder_final.")
_BY_BATCH = {
    "protein_dispersion.log_theta",
    "background_mean",
    "background_log_scale",
    "log_efficiency",
    "alpha_posterior_logit",
    "beta_posterior_logit",
}


def read_scvi_tools(
    path: str | PathLike,
    adata: AnnData | Mapping[str, AnnData] | None = None,
    *,
    prefix: str = "",
    key_added: str | None = None,
) -> SavedFit | dict[str, SavedFit] | None:
    """Read a model saved by scvi-tools, without running anything that the file says.

    ``model.pt`` is a pickle, which can contain any program. The reader used here makes containers, arrays and tensors
    out of it and looks up no other name, so that a file from a stranger does no harm.

    Parameters
    ----------
    path
        Folder that ``model.save(path)`` of scvi-tools wrote, or the ``model.pt`` in it. Models of the classes ``SCVI``,
        ``LinearSCVI``, ``SCANVI``, ``TOTALVI``, ``AUTOZI`` and ``GIMVI`` can be read; here they are called ``"scvi"``,
        ``"ldvae"``, ``"scanvi"``, ``"totalvi"``, ``"autozi"`` and ``"gimvi"``.
    adata
        Annotated data to put the model into, with all genes of the model in any order, and the columns it was set up
        with. For a ``GIMVI`` a mapping, ``{"seq": adata, "spatial": other}``: the names of the data sets from now on,
        those of its ``adata_seq`` and ``adata_spatial`` in this order. One of these two names alone will do.
    prefix
        The ``prefix`` that was given to ``model.save``.
    key_added
        Name of the fit; by default that of the model. ``adata`` must not have a fit of this name.

    Returns
    -------
    None if ``adata`` is given. Then ``adata.uns["scvi_ext"]["fits"][key_added]`` is written, and
    ``adata.uns["scvi_ext"]["setup"]`` if ``adata`` has not been set up yet; of a ``GIMVI`` in each of the data sets.
    Otherwise the ``SavedFit``, of a ``GIMVI`` a dictionary with one for each data set: plain data with
    ``model``, ``config``, ``setup``, ``var_names``, ``state`` (name -> float32 array), ``history`` and ``status``. The
    history has one row per epoch; its ``elbo_*`` have the sign of an ELBO, so that higher is better.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    KeyError
        ``adata`` lacks genes of the model, or columns it was set up with.
    TypeError
        ``adata`` is a mapping and the model is of one AnnData, or the other way round.
    ValueError
        The file is not a model of these classes, refers to anything but containers, arrays and tensors, or uses an
        option that does not exist here, or ``adata`` has been set up differently, or has batches or categories of
        covariates that the model does not know. Nothing has been written then.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> sx.io.read_scvi_tools("my_scvi_model", adata)  # doctest: +SKIP
    >>> sx.tl.get_latent(adata)  # doctest: +SKIP

    References
    ----------
    Gayoso et al. (2022), A Python library for probabilistic analysis of single-cell omics data, Nature Biotechnology.
    """
    file = _model_file(Path(path).expanduser(), prefix)
    content = read_torch_archive(file)
    try:
        of_datasets = "registries_" in content["attr_dict"]
        fits = _translate_gimvi(content, file) if of_datasets else [_translate(content, file)]
    except (AttributeError, KeyError, TypeError) as error:
        msg = (
            f"{str(file)!r} is not laid out as scvi-tools 1.x lays out a model of the classes {listing(_MODELS)} "
            f"({type(error).__name__}: {error}). Load it with scvi-tools and save it again."
        )
        raise ValueError(msg) from error
    fits = [fit if key_added is None else replace(fit, key=key_added) for fit in fits]
    if of_datasets:
        return _adopt_datasets(fits, adata)
    if isinstance(adata, Mapping):
        msg = f"The model is a {fits[0].model!r} fit of one AnnData, and a mapping was given: give the AnnData alone."
        raise TypeError(msg)
    return adopt(fits[0], adata)


def _adopt_datasets(fits: list[SavedFit], datasets: object) -> dict[str, SavedFit] | None:
    """Fits by the names of their data sets, or None after each has been written into the AnnData of this name."""
    if datasets is None:
        for fit in fits:
            check_fit(fit)
        return dict(zip(_DATASETS_OF_GIMVI, fits, strict=True))
    if not isinstance(datasets, Mapping):
        msg = (
            "The model is of two data sets, and one AnnData was given: give both by name, "
            "{'seq': adata_seq, 'spatial': adata_spatial}, or one of them, {'spatial': adata}."
        )
        raise TypeError(msg)
    given = list(datasets)
    names = given
    if set(given) <= set(_DATASETS_OF_GIMVI):
        names = _DATASETS_OF_GIMVI
    elif len(given) != 2:
        msg = (
            f"{len(given)} data sets were given, {listing(given)}, and the model is of two: the one that was adata_seq "
            "and the one that was adata_spatial, in this order."
        )
        raise ValueError(msg)
    if len({id(adata) for adata in datasets.values()}) < len(given):
        msg = f"The same AnnData was given under two names, {listing(given)}: each holds one data set; copy it."
        raise ValueError(msg)
    renamed = np.array(names, dtype=np.str_)
    fits = {
        name: replace(fit, joint=dict(fit.joint) | {"datasets": renamed, "dataset": name})
        for name, fit in zip(names, fits, strict=True)
    }
    adopt_all([(fits[name], adata) for name, adata in datasets.items()])
    return None


def _model_file(path: Path, prefix: str) -> Path:
    if path.is_file():
        if prefix:
            msg = f"{str(path)!r} is a file, so prefix={prefix!r} has no effect: leave it out, or give the folder."
            raise ValueError(msg)
        return path
    file = path / f"{prefix}{_FILE}"
    if not file.is_file():
        found = sorted(p.name for p in path.glob("*")) if path.is_dir() else []
        msg = (
            f"{str(file)!r} does not exist; the folder has: {listing(found)}. Give the folder that model.save() of "
            f"scvi-tools wrote, and prefix= if its files are called <prefix>{_FILE}."
        )
        raise FileNotFoundError(msg)
    return file


def _translate(content: Any, file: Path) -> SavedFit:
    attributes = content["attr_dict"]
    theirs = attributes["registry_"]
    name = theirs["model_name"]
    if name not in _MODELS:
        msg = f"{str(file)!r} is a model of the class {name!r}; these can be read: {listing(_MODELS)}."
        raise ValueError(msg)
    registry = _registry(theirs)
    config = _config(name, attributes["init_params_"], registry)
    weights = content["model_state_dict"]
    proteins = registry.sizes(0).proteins
    beside = {} if proteins is None else {"protein_batch_mask": np.array(proteins.protein_batch_mask)}
    if name == "AUTOZI":
        config |= _prior_of_delta(config, weights)
        beside["n_train"] = _n_train(attributes)
    return SavedFit(
        key=_MODELS[name],
        model=_MODELS[name],
        config=config,
        run={},
        setup=registry.to_uns(),
        var_names=np.array([str(gene) for gene in content["var_names"]]),
        state=_state(weights, config) | beside,
        history=_history(attributes.get("history_") or {}),
        status={"imported_from": f"scvi-tools {theirs['scvi_version']}", "trained": bool(attributes["is_trained_"])},
    )


def _translate_gimvi(content: Any, file: Path) -> list[SavedFit]:
    """A fit for each of the two data sets, which differ in what is their own."""
    attributes = content["attr_dict"]
    name = attributes["registries_"][0]["model_name"]
    if name != "GIMVI":
        msg = f"{str(file)!r} is a model of the class {name!r}; these can be read: {listing(_MODELS)}."
        raise ValueError(msg)
    registries = [_registry(theirs).read_by(frozenset()) for theirs in attributes["registries_"]]
    genes = [[str(gene) for gene in content[f"{dataset}_var_names"]] for dataset in _DATASETS_OF_GIMVI]
    config = _config_of_gimvi(attributes["init_params_"])
    joint = describe_genes(_DATASETS_OF_GIMVI, genes, registries)
    positions = {f"genes_{i}": joint["positions"][str(i)].astype(np.int64) for i in range(len(genes))}
    state = positions | _state_of_gimvi(content["model_state_dict"], config)
    version = attributes["registries_"][0]["scvi_version"]
    return [
        SavedFit(
            key="gimvi",
            model="gimvi",
            config=config,
            run={},
            setup=registry.to_uns(),
            var_names=np.array(own),
            state=state,
            history=_history(attributes.get("history_") or {}),
            status={"imported_from": f"scvi-tools {version}", "trained": bool(attributes["is_trained_"])},
            joint=joint | {"dataset": dataset},
        )
        for dataset, own, registry in zip(_DATASETS_OF_GIMVI, genes, registries, strict=True)
    ]


def _config_of_gimvi(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """All options of our model, from the arguments that theirs was made with."""
    options = dict(parameters["non_kwargs"])
    for further in parameters["kwargs"].values():
        options |= further
    options.pop("n_labels", None)  # their module has labels for a dispersion only, which is refused below
    unknown = options.keys() - _DEFAULTS_OF_GIMVI.keys()
    if unknown or options.get("dispersion") == "gene-label":
        option = min(unknown) if unknown else "dispersion"
        msg = f"The model was made with {option}={options[option]!r}, an option that 'gimvi' does not have here."
        raise ValueError(msg)
    config = _DEFAULTS_OF_GIMVI | {option: value for option, value in options.items() if value is not None}
    likelihoods, latent = config.pop("generative_distributions"), config.pop("model_library_size")
    # Defaults for options that change nothing in this combination: ignored there, refused here. The critic is not kept.
    ours = asdict(models.get("gimvi").config()) | {"kappa": 0.0, "kappa_fades": False, "fool_step": "joint"}
    config = ours | config
    config["reconstruction_losses"], config["model_library_bools"] = tuple(likelihoods), tuple(map(bool, latent))
    individual, shared = config["n_layers_decoder_individual"], config["n_layers_decoder_shared"]
    has_effect = {
        "dim_hidden_decoder_individual": individual > 1 or (individual and shared),
        "dim_hidden_decoder_shared": individual or shared,
        "dropout_rate_decoder": individual or shared,
        "dispersion": config["dispersion"] != "gene-cell" or set(likelihoods) != {"poisson"},
    }
    return config | {option: ours[option] for option, has in has_effect.items() if not has}


def _state_of_gimvi(weights: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Their weights under our names, without the parts that the model never uses."""
    gene_cell = config["dispersion"] == "gene-cell"
    unused = {
        "px_r": gene_cell or set(config["reconstruction_losses"]) == {"poisson"},
        "decoder.px_r_decoder.": not gene_cell,
        "decoder.px_dropout_decoder.": "zinb" not in config["reconstruction_losses"],
    }
    dropped = tuple(start for start, is_unused in unused.items() if is_unused)
    state = {}
    for theirs, array in weights.items():
        if theirs.startswith(dropped):
            continue
        name = _renamed(theirs, _RENAMED_WEIGHTS_OF_GIMVI | _RENAMED_WEIGHTS)
        if name == "dispersion.log_theta":
            array = array.reshape(-1) if config["dispersion"] == "gene" else array.T  # theirs is (G, K)
        elif name.startswith("libraries.") and ".log_" in name:
            array = array.reshape(-1)  # theirs is (1, K)
        state[name] = _as_saved(array)
        if name.startswith(_SHARED_IN_GIMVI) and ".batch_norm.0." in name:
            state[name.replace(".batch_norm.0.", ".batch_norm.1.")] = _as_saved(array)
    return state


def _registry(theirs: Mapping[str, Any]) -> Registry:
    arguments, fields = theirs["setup_args"], theirs["field_registries"]
    if "modalities" in arguments or arguments.get("panel_key") is not None:
        what = "setup_mudata" if "modalities" in arguments else "panel_key"
        msg = f"The model was set up with {what}, which has no counterpart here."
        raise ValueError(msg)

    def categories(field: str) -> tuple[str, ...]:
        return tuple(str(c) for c in fields[field]["state_registry"]["categorical_mapping"])

    unlabeled = arguments.get("unlabeled_category")
    unlabeled = None if unlabeled is None else str(unlabeled)
    labels = categories("labels") if arguments.get("labels_key") else ()
    covariates = tuple(arguments.get("categorical_covariate_keys") or ())
    mappings = fields["extra_categorical_covs"]["state_registry"]["mappings"] if covariates else {}
    proteins = fields.get("proteins", {}).get("state_registry", {})
    names = tuple(str(name) for name in proteins.get("column_names", ()))
    measured = proteins.get("protein_batch_mask") or {}
    return Registry(
        layer=arguments["layer"],
        batch_key=arguments["batch_key"],
        labels_key=arguments.get("labels_key"),
        unlabeled_category=unlabeled,
        size_factor_key=arguments.get("size_factor_key"),
        categorical_covariate_keys=covariates,
        continuous_covariate_keys=tuple(arguments.get("continuous_covariate_keys") or ()),
        batch_categories=categories("batch") if arguments["batch_key"] else (),
        labels_categories=tuple(label for label in labels if label != unlabeled),
        covariate_categories=tuple(tuple(str(c) for c in mappings[key]) for key in covariates),
        protein_obsm_key=arguments.get("protein_expression_obsm_key"),
        protein_names=names,
        missing_proteins=tuple(
            tuple(name for name, known in zip(names, np.ravel(measured[str(i)]), strict=True) if not known)
            for i in range(len(measured))
        ),
    )


def _config(name: str, parameters: Mapping[str, Any], registry: Registry) -> dict[str, Any]:
    """All options of our model, from the arguments that theirs was made with."""
    options = dict(parameters["non_kwargs"])
    for further in parameters["kwargs"].values():
        options |= further
    observed = options.pop("use_observed_lib_size", name != "LinearSCVI")
    options["library"] = "size_factor" if registry.size_factor_key else "observed" if observed else "latent"
    dropped = set(_ONLY_THERE)
    if name == "LinearSCVI":
        dropped |= _WITHOUT_EFFECT_IF_LINEAR
        options["use_batch_norm"] = "both" if options.get("use_batch_norm", True) else "encoder"

    if name == "SCANVI":
        dropped |= _WITHOUT_EFFECT_IF_SCANVI
        if options.get("y_prior") is not None:
            options["y_prior"] = tuple(float(p) for p in np.ravel(options["y_prior"]))

    renamed = _RENAMED_OPTIONS
    if name == "TOTALVI":
        dropped |= _KNOWN_IF_TOTALVI
        renamed = _RENAMED_OPTIONS_OF_TOTALVI
        # Their critic is not kept, their networks have these depths by default, their efficiency is always there.
        options = {"n_layers_encoder": 2, "adversarial_classifier": "off", "protein_efficiency": True} | options

    config = asdict(models.get(_MODELS[name]).config())
    for option, value in options.items():
        ours = renamed.get(option, option)
        if ours in config and option not in dropped:
            config[ours] = value
        elif value and option not in dropped:
            msg = f"The model was made with {option}={value!r}, an option that {_MODELS[name]!r} does not have here."
            raise ValueError(msg)
    return config | _without_effect(config, registry)


def _prior_of_delta(config: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, float]:
    """Options of the prior as the weights have it: they put alpha in the place of beta, and may learn beta alone."""
    if config["alpha_prior"] is None and config["beta_prior"] is None:
        return {}
    held = {name: float(expit(weights[f"{name}_logit"].item())) for name in ("alpha_prior", "beta_prior")}
    changed = {name: value for name, value in held.items() if not np.isclose(value, config[name] or 0, atol=1e-6)}
    if changed:
        asked = ", ".join(f"{name}={config[name]!r}" for name in held)
        has = ", ".join(f"{name}={round(value, 6)}" for name, value in held.items())
        warn(f"The model was made with {asked}, but its weights have the prior {has}: that is what was read.")
    return {name: round(value, 6) for name, value in changed.items()}


def _n_train(attributes: Mapping[str, Any]) -> np.ndarray:
    """How many cells share the divergence of delta; a model that was not trained has none."""
    cells = attributes.get("train_indices_")
    if cells is None:
        warn("The file does not say how many cells the model was trained on: of its ELBO, each counts as the only one.")
    return np.array([1 if cells is None else len(cells)], dtype=np.float32)


def _without_effect(config: Mapping[str, Any], registry: Registry) -> dict[str, Any]:
    """Defaults for options that change nothing in this combination: ignored there, refused here."""
    encodable = (
        len(registry.batch_categories) > 1 or registry.covariate_categories or registry.continuous_covariate_keys
    )
    defaults = {}
    if config["n_layers"] == 1 and "deeply_inject_covariates" in config:
        defaults["deeply_inject_covariates"] = True
    if not encodable:
        defaults["encode_covariates"] = False
    name = "gene_dispersion" if "gene_dispersion" in config else "dispersion"
    dispersion, likelihood = _dispersion_and_likelihood(config)
    if likelihood == "poisson" or (dispersion == "gene-label" and not registry.labels_key):
        defaults[name] = "gene"
    if config.get("zero_inflation") == "gene-label" and not registry.labels_key:
        defaults["zero_inflation"] = "gene"
    return defaults


def _dispersion_and_likelihood(config: Mapping[str, Any]) -> tuple[str, str]:
    """These options of the model's genes, whatever it calls them; AutoZI has one likelihood."""
    if "gene_dispersion" in config:
        return config["gene_dispersion"], config["reconstruction_loss_gene"]
    return config["dispersion"], config.get("reconstruction_loss", "zinb")


def _state(weights: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Their weights under our names. Parts that the model never uses are left out: they were not trained."""
    dispersion, likelihood = _dispersion_and_likelihood(config)
    shared_theta = likelihood != "poisson" and dispersion != "gene-cell"
    unused = {
        "pyro_param_store": True,
        "px_r": not shared_theta,
        "l_encoder.": config["library"] != "latent",
        "encoder.l_gene": config["library"] != "latent",
        "decoder.px_r_decoder.": dispersion != "gene-cell",
        "decoder.px_dropout_decoder": likelihood != "zinb",
    }
    dropped = tuple(start for start, is_unused in unused.items() if is_unused)
    state = {}
    for name, array in weights.items():
        if name.startswith(dropped):
            continue
        name = _renamed(name, _RENAMED_WEIGHTS)
        if name == "dispersion.log_theta":
            array = array.reshape(-1) if dispersion == "gene" else array.T  # theirs is (G, K)
        elif name in _BY_BATCH:
            array = array.T  # theirs is (P, K) or (P,), of delta (G, K), (G, C) or (G,)
            if config.get("zero_inflation") == "gene":
                array = array.reshape(-1)  # of a model by label that has no labels
        elif name.startswith("library.log_"):
            array = array.reshape(-1)  # theirs is (1, K)
        elif name == "log_y_prior":
            array = np.log(array).reshape(-1)  # theirs is (1, C)
        state[name] = _as_saved(array)
    return state


def _renamed(name: str, patterns: Mapping[str, str]) -> str:
    for pattern, replacement in patterns.items():
        name = re.sub(pattern, replacement, name)
    return name


def _as_saved(array: np.ndarray) -> np.ndarray:
    return np.array(array, dtype=np.float32 if array.dtype.kind == "f" else array.dtype, order="C")


def _history(frames: Mapping[str, Any]) -> pd.DataFrame:
    """One row per epoch, from one table per quantity."""
    columns, unread = {}, []
    for name, frame in frames.items():
        try:
            # Their "elbo" is a loss.
            columns[name] = -_column(frame) if name.startswith("elbo_") else _column(frame)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            unread.append(name)
    if unread:
        msg = f"Tables of the training history have a layout that is not understood; left out: {listing(unread)}."
        warn(msg)
    return pd.DataFrame(columns).rename_axis("epoch")


def _column(frame: Record) -> pd.Series:
    """The one column of a table, from the block and the axes that pandas (1.3 and newer) writes for it."""
    (block,), (_, epochs) = frame.state["_mgr"].args
    values = np.asarray(block.args[0]).reshape(-1)
    index = epochs.args[1]
    index = index["data"] if "data" in index else range(index["start"], index["stop"], index["step"])
    return pd.Series([float(v) for v in values], index=pd.Index([int(i) + 1 for i in index]))  # theirs begins at 0
