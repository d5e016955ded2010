"""Teachers: objects that read the teacher's side of a batch. The trainer does not know which."""

from hf_distill.teachers.completions import RemoteTeacherError
from hf_distill.teachers.models import ModelTeacher, as_teacher, place
from hf_distill.teachers.protocol import Teacher, check_kinds
from hf_distill.teachers.remote import RemoteTeacher
from hf_distill.teachers.routed import RoutedCollator, RoutedTeacher, each_teacher, routed
from hf_distill.teachers.selves import SelfTeacher, adapters_off

__all__ = [
    "ModelTeacher",
    "RemoteTeacher",
    "RemoteTeacherError",
    "RoutedCollator",
    "RoutedTeacher",
    "SelfTeacher",
    "Teacher",
    "adapters_off",
    "as_teacher",
    "check_kinds",
    "each_teacher",
    "place",
    "routed",
]
