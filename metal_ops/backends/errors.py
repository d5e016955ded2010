"""Defines what a kernel backend raises when the machine refuses a kernel."""


class KernelError(RuntimeError):
    """A kernel could not be compiled or launched; the call may be repeated by another backend.

    It is raised before anything that a caller can see has been written.

    Attributes:
        kernel: its name; one report is made of each.
        text: what the compiler or the driver said.
    """

    def __init__(self, kernel: str, text: str) -> None:
        super().__init__(f"kernel {kernel}: {text}")
        self.kernel, self.text = kernel, text
