"""Types that validate the parameters of the flows, on the command line and in Prefect."""

from typing import Annotated

from prefect.client.schemas.schedules import CronSchedule
from pydantic import AfterValidator, Field

Count = Annotated[int, Field(gt=0, lt=2**31)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
ModelName = Annotated[str, Field(pattern=r"^(\w[\w .-]{0,99})?$")]  # MLflow accepts more, but not in each URI
Cron = Annotated[str, AfterValidator(CronSchedule.valid_cron_string)]
