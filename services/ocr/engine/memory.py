"""The memory that loading a model takes."""

# Bytes a number takes while a model is loaded: int8 weights are made out of float32 ones.
_NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def needed_bytes(number_count: int, precision: str) -> int:
    """Memory that loading a model of so many numbers takes."""
    return number_count * _NUMBER_BYTES.get(precision, 4)
