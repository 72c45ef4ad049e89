"""A picture: a Matplotlib figure that a notebook shows."""

from io import BytesIO

from matplotlib.figure import Figure
from PIL import Image

__all__ = ["Picture"]


class Picture(Figure):
    """A Matplotlib figure that a notebook shows as an image, whether or not `pyplot` was ever imported."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        # Twice the pixels in the same place: sharp on the screens of today. A palette takes a quarter of the bytes, and
        # notebooks are stored with their pictures.
        image, small = BytesIO(), BytesIO()
        self.savefig(image, format="png", dpi=2 * self.dpi)
        Image.open(image).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(small, "png", optimize=True)
        return small.getvalue(), {"width": round(self.get_figwidth() * self.dpi)}
