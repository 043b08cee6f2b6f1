"""Finds texts that go round in circles, as decoders write that have lost the line."""

# A circle is a run of characters that follows itself at least twice more ...
_TIMES = 3
# ... so that at least so many characters are repeats of what stood before. Of 13,431 labels and texts of
# lines the most that any repeats is 7 ("- - - - . "); a decoder that loops goes on until its tokens are used up.
_REPEATED = 12


def goes_round(text: str) -> bool:
    """Whether a stretch of the text repeats itself and either ends the text or makes up at least half of it."""
    length = len(text)
    for period in range(1, length // _TIMES + 1):
        needed = max(_REPEATED, (_TIMES - 1) * period)
        repeated = 0  # characters so far that equal the one a period before
        for place in range(period, length):
            repeated = repeated + 1 if text[place] == text[place - period] else 0
            if repeated >= needed and (place == length - 1 or 2 * (repeated + period) >= length):
                return True
    return False
