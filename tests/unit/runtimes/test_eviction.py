"""Which models leave so that another fits."""

from hypothesis import given
from hypothesis import strategies as st

from services.runtimes.eviction import Held, leaving

helds = st.lists(
    st.builds(
        Held,
        name=st.uuids().map(str),
        weight_bytes=st.integers(1, 50),
        last_used=st.integers(0, 9),
        is_idle=st.booleans(),
    ),
    max_size=6,
    unique_by=lambda held: held.name,
)


@given(helds, st.integers(1, 120), st.integers(1, 120))
def test_what_leaves_makes_room_and_nothing_leaves_in_vain(held: list[Held], needed: int, limit: int) -> None:
    names = leaving(held, needed, limit)
    if names is None:
        assert needed > limit
        return
    staying = [model for model in held if model.name not in names]
    left = [model for model in held if model.name in names]
    assert sum(model.weight_bytes for model in staying) + needed <= limit
    for model in left:
        # Whoever stays was used later, or is in use.
        assert all((not other.is_idle, other.last_used) >= (not model.is_idle, model.last_used) for other in staying)
    if left:
        last = max(left, key=lambda model: (not model.is_idle, model.last_used, names.index(model.name)))
        assert sum(model.weight_bytes for model in [*staying, last]) + needed > limit
