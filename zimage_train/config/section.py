"""What all sections of a config have in common."""

from pydantic import BaseModel, ConfigDict

from zimage_train.config.values import STRICT


class Section(BaseModel):
    model_config = STRICT | ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
