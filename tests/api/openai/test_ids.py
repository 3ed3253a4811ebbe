"""Each id has one name in OpenAI's API, and each name at most one id."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.api.openai.ids import (
    FUNCTION_NAME_LENGTH_MAX,
    conversation_id,
    flat_name,
    item_id_of,
    item_name,
    public_session_id_of,
    response_id,
    turn_id_of,
)
from service.ids import SESSION_ID, new_item_id, new_session_id, new_turn_id
from service.storage.records import Item

HEX = "0123456789abcdef" * 2


def test_the_names_have_the_digits_of_the_ids() -> None:
    assert response_id(f"turn_{HEX}") == f"resp_{HEX}"
    assert conversation_id(f"sess_{HEX}") == f"conv_{HEX}"
    assert conversation_id("support-4711") == "conv_-support-4711"


def test_new_ids_come_back() -> None:
    turn_id, session_id = new_turn_id(), new_session_id()
    assert turn_id_of(response_id(turn_id)) == turn_id
    assert public_session_id_of(conversation_id(session_id)) == session_id


@given(st.from_regex(SESSION_ID, fullmatch=True))
@example("-")
@example("conv_-x")
@example(f"sess_{HEX.upper()}")
@example(f"-{HEX}")
@example(f"sess_{HEX}0")
def test_every_session_has_one_conversation(public: str) -> None:
    assert public_session_id_of(conversation_id(public)) == public


@given(st.one_of(st.text(max_size=40), st.from_regex(r"(resp|conv|turn|sess)_-?[0-9a-z_-]{0,40}", fullmatch=True)))
@example(f"conv_-sess_{HEX}")
@example(f"resp_{HEX}\n")
@example(f"conv_{HEX}\n")
@example("conv_-..")
def test_a_name_that_leads_to_an_id_is_the_name_of_this_id(name: str) -> None:
    turn_id, public = turn_id_of(name), public_session_id_of(name)
    assert turn_id is None or response_id(turn_id) == name
    assert public is None or conversation_id(public) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "resp_",
        f"turn_{HEX}",
        HEX,
        f"resp_{HEX.upper()}",
        f"resp_{HEX}0",
        f"conv_-sess_{HEX}",
        "conv_",
        "conv_-",
        "conv_x",
    ],
)
def test_a_name_of_another_form_leads_nowhere(name: str) -> None:
    assert turn_id_of(name) is None
    assert public_session_id_of(name) is None


def test_only_reasoning_has_another_name_than_its_id() -> None:
    reasoning = Item(id=f"msg_{HEX}", type="reasoning", role="assistant", text="")
    assert item_name(reasoning) == f"rs_{HEX}"
    assert item_id_of(f"rs_{HEX}") == reasoning.id
    for kind in ("message", "function_call", "function_call_output"):
        item = Item(id=new_item_id(kind), type=kind, role="user", text="")
        assert item_id_of(item_name(item)) == item.id == item_name(item)
    for other in ("rs_", "rs_x", f"turn_{HEX}", f"rs_{HEX}\n", ""):
        assert item_id_of(other) is None


def test_functions_of_namespaces_get_flat_names_that_servers_take() -> None:
    assert flat_name("files", "read") == "files__read"
    assert flat_name("mcp__files__", "read") == "mcp__files__read"
    long = [flat_name("n" * 60, name) for name in ("read", "reap")]
    assert len(set(long)) == 2
    assert all(len(name) == FUNCTION_NAME_LENGTH_MAX and name.startswith("n" * 55) for name in long)
    assert long[0] == flat_name("n" * 60, "read")
