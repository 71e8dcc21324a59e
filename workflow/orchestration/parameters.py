"""Types that validate flow parameters on the command line and in Prefect, and explain their bounds."""

from collections.abc import Callable
from typing import Annotated, Any

from prefect.client.schemas.schedules import CronSchedule
from pydantic import AfterValidator, Field, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError


def explain(reason: str) -> WrapValidator:
    """Return a validator that adds the reason for the upper bound, or for the pattern, to the error message."""

    def validate(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            if error.errors()[0]["type"] not in ("less_than", "less_than_equal", "string_pattern_mismatch"):
                raise
            message = {"message": f"{error.errors()[0]['msg']}: {reason}"}
            raise PydanticCustomError("bounds", "{message}", message) from error

    return WrapValidator(validate)


Count = Annotated[int, Field(gt=0, le=100_000), explain("more takes days, and hardly changes the model")]
Rate = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), explain("with larger steps, training diverges")]
Seed = Annotated[int, Field(ge=0, lt=2**32), explain("NumPy accepts no larger seed")]
Fraction = Annotated[float, Field(ge=0, le=0.9), explain("with more dropout, too few features are left to learn from")]
ModelName = Annotated[
    str, Field(pattern=r"^(\w[\w .-]{0,99})?$"), explain("use up to 100 letters, digits, spaces, dots, - and _")
]
Cron = Annotated[str, AfterValidator(CronSchedule.valid_cron_string)]
