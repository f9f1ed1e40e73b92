"""What Tune may keep of our searchers: nothing. A sweep goes on from its own files, which are text; a searcher's
state would be a pickle, which runs code when it is read."""

from ray.tune.search import Searcher


class UnsavedSearcher(Searcher):
    """A searcher that leaves no file, and takes none."""

    def save(self, checkpoint_path: str) -> None:
        """Writes nothing; Tune asks for it at every snapshot."""

    def restore(self, checkpoint_path: str) -> None:
        """Raises:
        ValueError: always.
        """
        raise ValueError(
            f"{checkpoint_path}: a sweep goes on from its own files, never from Ray Tune's; use `tenfold resume`"
        )
