"""CogView3-Plus: text to image, called as CogView4 is."""

from families import Case
from families.cogview4 import IMAGE, inputs

CASES = {"cogview3plus": Case("CogView3PlusTransformer2DModel", inputs, grid=IMAGE)}
