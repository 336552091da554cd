"""One clear sentence at import if transformers or torch is a version that the library was not made for."""

from importlib.metadata import PackageNotFoundError, version

SUPPORTED = {"torch": ((2, 11), None), "transformers": ((5, 17), (6,))}


def check_versions() -> None:
    """Raises ImportError naming the package, its version and the range that works."""
    for package, (lowest, below) in SUPPORTED.items():
        wanted = f"{package} >= {'.'.join(map(str, lowest))}" + (f", < {'.'.join(map(str, below))}" if below else "")
        try:
            found = version(package)
        except PackageNotFoundError:
            raise ImportError(f"landmark_llama needs {wanted}, which is not installed") from None
        number = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
        if number < lowest or (below and number >= below):
            raise ImportError(f"landmark_llama needs {wanted}; found {package} {found}")


check_versions()
