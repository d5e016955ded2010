"""Teachers: objects that read the teacher's side of a batch. The trainer does not know which."""

from hf_distill.teachers.base import Teacher, UpdateTeacher
from hf_distill.teachers.hidden_state_teacher import HiddenStateTeacher
from hf_distill.teachers.initial_adapters import adapters_off, has_adapters
from hf_distill.teachers.model import ModelTeacher, as_teacher, place_model
from hf_distill.teachers.remote import RemoteTeacher
from hf_distill.teachers.routed import RoutedCollator, RoutedTeacher
from hf_distill.teachers.self_teacher import SelfTeacher, SelfTeacherConfig
from hf_distill.teachers.server_requests import RemoteTeacherError

__all__ = [
    "HiddenStateTeacher",
    "ModelTeacher",
    "RemoteTeacher",
    "RemoteTeacherError",
    "RoutedCollator",
    "RoutedTeacher",
    "SelfTeacher",
    "SelfTeacherConfig",
    "Teacher",
    "UpdateTeacher",
    "adapters_off",
    "as_teacher",
    "has_adapters",
    "place_model",
]
