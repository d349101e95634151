"""A teacher behind HTTP: both ends, and what goes between them."""

from .dialects import RemoteSettings
from .teacher import RemoteTeacher
