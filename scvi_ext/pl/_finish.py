"""Show and save, as scanpy's plotting functions do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import scanpy as sc

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure


def finish(figure: Figure, show: bool | None, save: str | Path | None) -> bool:
    """Save and show a figure where asked for; say whether it was shown."""
    if isinstance(save, bool):
        msg = f"save={save!r} must be the name of a file, such as 'figure.png', or None."
        raise TypeError(msg)
    if save is not None:
        figure.savefig(save, bbox_inches="tight", dpi=150)
    show = (sc.settings.autoshow and save is None) if show is None else show
    if show:
        plt.show()
    return show
