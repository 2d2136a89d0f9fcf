"""open_clip with gapkern's losses under its own names, for a while."""

from typing import Any

from gapkern import _check
from gapkern.losses.open_clip import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss

_OURS = (ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss)
_originals: dict[tuple[Any, str], Any] = {}
_active: list["patch_open_clip"] = []


class patch_open_clip:
    """Makes open_clip's `create_loss` and its names for the losses return gapkern's classes.

    In effect at once; `undo()` or leaving a `with` block takes it back. Where several are in effect, the last to be
    undone gives open_clip its classes back, in whatever order. Meanwhile instances of open_clip's own classes pass
    `isinstance` under the patched names; gapkern's pass it under open_clip's, then and afterwards.

    Example:
        >>> import open_clip
        >>> with patch_open_clip():
        ...     open_clip.ClipLoss.__module__
        'gapkern.losses.open_clip.clip'
        >>> open_clip.ClipLoss.__module__
        'open_clip.loss'
    """

    def __init__(self) -> None:
        open_clip = _check.extra("open_clip", "open_clip_torch", "demo")
        if not _active:
            _replace(open_clip)
        _active.append(self)

    def undo(self) -> None:
        """Ends this patch; the last one gives open_clip its own classes back."""
        if self not in _active:
            return
        _active.remove(self)
        if not _active:
            _restore()

    def __enter__(self) -> "patch_open_clip":
        return self

    def __exit__(self, *_: Any) -> None:
        self.undo()


def _replace(open_clip: Any) -> None:
    for ours in _OURS:
        name = ours.__name__
        theirs = getattr(open_clip.loss, name, None)
        if isinstance(theirs, type):
            _inherit(ours, theirs)
            ours.stands_for = theirs
        for module in (open_clip, open_clip.loss, open_clip.factory):
            if hasattr(module, name):
                _originals[module, name] = getattr(module, name)
                setattr(module, name, ours)


def _restore() -> None:
    for (module, name), original in _originals.items():
        if getattr(module, name, None) in _OURS:  # what somebody else has put there since is theirs
            setattr(module, name, original)
    _originals.clear()
    for ours in _OURS:
        ours.stands_for = None


def _inherit(ours: type, theirs: type) -> None:
    """Makes `ours` a subclass of `theirs`, of which it overrides everything."""
    if theirs not in ours.__mro__:
        ours.__bases__ = (*ours.__bases__, theirs)
