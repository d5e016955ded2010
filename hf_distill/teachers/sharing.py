"""A teacher and a student that have parameters or modules in common.

Adapters put into a teacher's own modules, layers taken out of it, tied embeddings and weights that
were loaded without a copy are all such. What is frozen on both sides may be shared. What the
student trains must not be: the teacher would change with it.
"""

from torch import Tensor, nn

from hf_distill.models.modes import evaluating_each


def _extent(tensor: Tensor) -> tuple[int, int, int] | None:
    """Return a tensor's storage, and its bytes in it, first to behind the last; or None."""
    if type(tensor) not in (Tensor, nn.Parameter) or not tensor.numel():
        return None
    storage = tensor.untyped_storage().data_ptr()
    if not storage:  # on the meta device
        return None
    size = tensor.element_size()
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.storage_offset() * size
    return storage, int(start), int(start + (last + 1) * size)


def shared_trainable(teacher: nn.Module, student: nn.Module) -> tuple[str, str] | None:
    """Return the first parameter that the student trains and the teacher has, its names in both.

    Parameters of other objects count where they lie in the same memory.
    """
    trained = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    by_id = {id(p): name for name, p in trained}
    by_storage: dict[int, list[tuple[int, int, str]]] = {}
    for name, parameter in trained:
        extent = _extent(parameter)
        if extent is not None:
            by_storage.setdefault(extent[0], []).append((*extent[1:], name))
    for name, parameter in teacher.named_parameters():
        if id(parameter) in by_id:
            return name, by_id[id(parameter)]
        storage, start, end = _extent(parameter) or (0, 0, 0)
        for first, behind, other in by_storage.get(storage, ()):
            if first < end and start < behind:
                return name, other
    return None


def check_sharing(teacher: nn.Module, student: nn.Module) -> None:
    """Check that nothing that the student trains is the teacher's.

    Raises:
        ValueError: they share such a parameter; the message names the first.
    """
    if teacher is student:
        raise ValueError(
            "the teacher must not be the student's own object, which is trained: use SelfTeacher, "
            "or a copy"
        )
    found = shared_trainable(teacher, student)
    if found is not None:
        name, other = found
        of_student = "" if other == name else f", which is {other!r} of the student"
        raise ValueError(
            "the teacher must not share parameters that are trained, it would change with the "
            f"student; the first is {name!r}{of_student}: make the teacher a copy of its own "
            "(copy.deepcopy, before adapters are added to the model), or give SelfTeacher('base') "
            "if it is to be the student without its adapters"
        )


def freeze(teacher: nn.Module, student: nn.Module) -> list[nn.Module]:
    """Freeze a teacher and put it in eval mode, but for what it has in common with the student.

    Returns:
        The modules that they have in common, whose mode is the student's.
    """
    of_student = {id(x) for x in (*student.parameters(), *student.modules())}
    for parameter in teacher.parameters():
        if id(parameter) not in of_student:
            parameter.requires_grad_(False)
    common = [module for module in teacher.modules() if id(module) in of_student]
    with evaluating_each(common):  # afterwards these are as they were
        teacher.eval()
    return common
