"""The four kinds of generated documents. A new one is one file here and one line in `SCHEMAS`."""

from __future__ import annotations

from specache.eval.tasks.extract.schemas.base import Record, Schema, Value, stated_fields
from specache.eval.tasks.extract.schemas.harbour_log import HARBOUR_LOG
from specache.eval.tasks.extract.schemas.minutes import MINUTES
from specache.eval.tasks.extract.schemas.register import REGISTER
from specache.eval.tasks.extract.schemas.shop import CATALOGUE

SCHEMAS = {schema.name: schema for schema in (CATALOGUE, MINUTES, REGISTER, HARBOUR_LOG)}

__all__ = ["SCHEMAS", "Record", "Schema", "Value", "stated_fields"]
