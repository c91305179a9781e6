"""The settings of what works on rows: this process, or Ray over many."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from glmtune.config.groups import NameText, Settings, conflict

_ADDRESS = (
    "address of a Ray cluster, HOST:PORT (default: the environment's RAY_ADDRESS, else a Ray is "
    "started on this machine for the command)"
)


class EngineSettings(Settings):
    """Which engine works on the rows."""

    group: ClassVar[str] = "engine"
    engine: Literal["local", "ray"] = Field(
        "local",
        description="what works on the rows: this process, or Ray Data on all cores and machines "
        "that it has, with the same result",
    )
    ray_address: NameText | None = Field(None, description=_ADDRESS)

    @model_validator(mode="after")
    def address_of_ray(self) -> Self:
        """Refuse an address that nothing would use."""
        if self.ray_address and self.engine != "ray":
            raise conflict(
                f"ray_address {self.ray_address} has no effect with engine {self.engine}: set "
                "engine ray, or leave it out",
                "ray_address",
                "engine",
            )
        return self
