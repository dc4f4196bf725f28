"""`hf-nft ls`: what there is, one name first on each line."""

import dataclasses
from typing import Annotated, Any

import typer
from hf_nft.cli import common

EXAMPLES = """\b
Examples:
  hf-nft ls attacks
  hf-nft ls attacks badnets
  hf-nft ls modules runs/victim
"""


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(epilog=EXAMPLES)(ls)


def ls(
    what: Annotated[str, typer.Argument(help="attacks, tasks, defenses, models, recipes or modules.")],
    name: Annotated[str | None, typer.Argument(help="One of them: its settings. For modules: the model.")] = None,
    revision: common.Revision = None,
    allow_pickle: common.AllowPickle = False,
    trust_remote_code: common.RemoteCode = False,
) -> None:
    """List what there is, or the settings of one of them."""
    from hf_nft import registry
    from hf_nft.errors import ConfigError, UnknownNameError

    if what != "modules" and (revision or allow_pickle or trust_remote_code):
        raise ConfigError(
            f"ls {what}: expected no option on how to load a model, found one. They belong to: hf-nft ls modules MODEL"
        )
    if what == "recipes":
        _recipes(name)
    elif what == "modules":
        _modules(name, revision, allow_pickle, trust_remote_code)
    elif what not in registry.KINDS:
        raise UnknownNameError("list", what, [*registry.KINDS, "recipes", "modules"])
    elif name is None:
        for known in registry.names(what):
            typer.echo(f"{known:<22} {_summary(registry.get(what, known))}")
    else:
        _settings(registry.get(what, name))


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _settings(cls: Any) -> None:
    typer.echo(f"{cls.name:<22} {_summary(cls)}")
    if getattr(cls, "source", None):
        typer.echo(f"{'source':<22} {cls.source}")
    for preset, values in getattr(cls, "presets", {}).items():
        typer.echo(f"{'preset ' + preset:<22} {values or 'the defaults below'}")
    for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        if field.default is not dataclasses.MISSING:
            typer.echo(f"{field.name:<22} {field.metadata.get('help', '')} [{field.default!r}]")


def _recipes(name: str | None) -> None:
    from hf_nft import recipes

    if name is not None:
        typer.echo(recipes.path_of(name).read_text(), nl=False)
        return
    for known in recipes.names():
        typer.echo(f"{known:<44} {recipes.load(known)['description']}")


def _modules(model: str | None, revision: str | None, allow_pickle: bool, trust_remote_code: bool) -> None:
    from hf_nft.errors import ConfigError

    if model is None:
        raise ConfigError("ls modules: expected a model, found none. Try: hf-nft ls modules runs/victim")
    from hf_nft.adapter import NFTConfig, maskable_modules, resolve_targets
    from hf_nft.suspect import load_suspect

    with common.quiet_libraries():
        suspect = load_suspect(
            model, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
        ).model
    chosen = resolve_targets(suspect, NFTConfig())
    for known, target in maskable_modules(suspect).items():
        picked = chosen.get(known)
        mark = f"{picked.units} masks by default ({picked.side})" if picked else ""
        typer.echo(f"{known:<44} {target.units:>6} units on its {target.side:<8} {mark}".rstrip())
