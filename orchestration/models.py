"""From what a user writes after `model:` to a shape, without loading the model."""

from pathlib import Path

from search_spaces.architecture import ModelShape, UnknownArchitectureError
from trainers.base_fetch import hub_config, is_hub_id
from trainers.foreign_code import indexed_files, refuse_other_weights, refuse_own_code


def config_path(model: str, revision: str | None = None) -> Path:
    """config.json of a folder, of itself, or of a hub id (fetched).

    Raises:
        ValueError: there is none.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model {model}: the folder must hold a config.json, it has none")
        return path / "config.json"
    if path.is_file():
        return path
    if not is_hub_id(model):
        raise ValueError(f"model {model}: no such file or folder")
    return hub_config(model, revision)


def model_shape(model: str, revision: str | None = None) -> ModelShape:
    """The shape, from the config alone; of an unknown architecture from the model that transformers
    builds without weights.

    Raises:
        ValueError: no readable config, or a model that brings code of its own.
    """
    path = config_path(model, revision)
    refuse_own_code(path, model)
    try:
        return ModelShape.from_config(path)
    except UnknownArchitectureError:
        from trainers.meta_shape import shape_of_folder  # needs torch and transformers

        return shape_of_folder(path.parent if path.name == "config.json" else path)


def require_weights(model: str) -> None:
    """A sweep needs more than a config.json. Reads headers alone.

    Raises:
        ValueError: a local folder without config.json or whole safetensors, or with more than a base's, or a
            bare config file.
    """
    path = Path(model).expanduser()
    if path.is_file():
        raise ValueError(
            f"model {model}: a sweep needs a folder with weights, this is a file (plan can use it)"
        )
    if not path.is_dir():
        return  # a hub id: its download is checked by who loads it
    folder = config_path(model).parent
    refuse_other_weights(folder, model)
    files = set(folder.glob("*.safetensors"))
    for file in sorted(files | {folder / name for name in indexed_files(folder)}):
        _require_whole(file)


def _require_whole(file: Path) -> None:
    """A header that says what the file holds, and all of it there."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):
            return
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file}: must be a whole safetensors file, it is not ({error}); copy or download it again"
        ) from error
