"""The metadata key inkwell-hardware."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway import preference
from services.gateway.preference import LABELS, Preference
from services.kit.faults import Fault, Kind


@pytest.mark.parametrize(
    ("text", "labels", "strict"),
    [
        ("cpu", ("cpu",), False),
        ("cuda, rocm, cpu", ("cuda", "rocm", "cpu"), False),
        (" CUDA ,cpu", ("cuda", "cpu"), False),
        ("cuda!", ("cuda",), True),
        ("cuda, rocm!", ("cuda", "rocm"), True),
        ("cuda !, rocm", ("cuda", "rocm"), True),
        ("cpu, cuda, cpu", ("cpu", "cuda"), False),
    ],
)
def test_lists(text: str, labels: tuple[str, ...], strict: bool) -> None:
    assert preference.parse(text) == Preference(labels, strict)


@pytest.mark.parametrize("text", ["", ",", "cuda,", "gpu", "cuda!!", "!", "cuda;cpu", "c" * 500])
def test_what_is_no_list_of_labels_is_refused_by_name(text: str) -> None:
    with pytest.raises(Fault) as refused:
        preference.parse(text)
    assert refused.value.data.kind is Kind.INVALID_ARGUMENT
    assert refused.value.data.fields[0].field == "metadata.inkwell-hardware"
    assert all(label in refused.value.data.message for label in LABELS)


def test_several_entries_read_as_one_list() -> None:
    found = preference.from_metadata([("inkwell-hardware", "cuda"), ("x", "y"), ("inkwell-hardware", "cpu!")])
    assert found == Preference(("cuda", "cpu"), strict=True)
    assert preference.from_metadata([("x", "y")]) == preference.NO_PREFERENCE


labels = st.lists(st.sampled_from(LABELS), unique=True)


@given(wanted=labels, default=labels, strict=st.booleans())
def test_the_order_holds_what_is_wanted_first_and_the_rest_unless_strict(
    wanted: list[str], default: list[str], strict: bool
) -> None:
    order = Preference(tuple(wanted), strict).order(default)
    assert list(order[: len(wanted)]) == wanted
    assert list(order[len(wanted) :]) == ([] if strict else [label for label in default if label not in wanted])


@given(st.text(max_size=300))
def test_any_text_is_read_or_refused(text: str) -> None:
    found: Preference | None = None
    refused: Fault | None = None
    try:
        found = preference.parse(text)
    except Fault as fault:
        refused = fault
    if refused is not None:
        assert refused.data.kind is Kind.INVALID_ARGUMENT
        assert len(refused.data.message) < 400
    else:
        assert found is not None
        assert found.labels
        assert set(found.labels) <= set(LABELS)
