"""What is kept of the dialects that servers have shown to need."""

from service.models.chat_completions import Dialect
from service.models.dialects import MODELS_MAX, KnownDialects

OTHER = Dialect(stream_options=False)


def test_a_model_without_a_known_dialect_is_asked_in_the_usual_one() -> None:
    dialects = KnownDialects()
    dialects.note_understood("one", OTHER)
    assert dialects.of("one") == OTHER
    assert dialects.of("other") == Dialect()


def test_a_bounded_number_of_dialects_is_kept_and_those_in_use_stay() -> None:
    dialects = KnownDialects()
    dialects.note_understood("in use", OTHER)
    for number in range(3 * MODELS_MAX):
        dialects.note_understood(f"made up {number}", OTHER)
        assert dialects.of("in use") == OTHER
    kept = [number for number in range(3 * MODELS_MAX) if dialects.of(f"made up {number}") == OTHER]
    assert kept == list(range(2 * MODELS_MAX + 1, 3 * MODELS_MAX))
