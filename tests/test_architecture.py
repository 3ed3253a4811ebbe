"""Imports point one way, and each library with a fixed place is imported only there."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

SERVICE = Path(__file__).parent.parent / "service"

LAYERS = (
    ("cli", "asgi", "__main__"),
    ("hosting",),
    ("api",),
    ("supervisor", "shutdown", "api_keys", "gauges"),
    ("sessions",),
    ("cluster",),
    ("models", "storage"),
    ("telemetry",),
    (
        "errors",
        "failure_codes",
        "settings",
        "setting_types",
        "setting_sources",
        "client_settings",
        "service_links",
        "clock",
        "freezes",
        "byte_locks",
        "ids",
        "http1_lines",
        "json_words",
        "long_texts",
        "lagging_deadlines",
        "steps",
        "stop_state",
        "store_capabilities",
        "watched_files",
    ),
)
"""The layers, outermost first. A module imports from lower layers, and from its own package or top-level layer."""

PROTOCOLS = {
    "models": {"client", "upstreams"},
    "storage": {"pieces", "records", "rules", "standing", "store", "store_deadline"},
}
"""The modules of these packages that modules other than the supervisor may import."""

PLACES: dict[str, list[str]] = {
    "httpx": ["models.http", "models.openai_compatible", "cli.connection"],
    "lastcall_client": ["cli"],
    "hypercorn": ["hosting"],
    "opentelemetry": ["telemetry.trace_export", "telemetry.tracing"],
    "quart": ["api", "hosting"],
    "quart_trio": ["api", "hosting"],
    "asyncio": [],
}
"""The only packages or modules that may import these."""

FACES = ("api.native", "api.openai", "api.operator")
"""The faces of the API. What they share is in ``api.http``."""

MODULES = {
    ".".join(path.relative_to(SERVICE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SERVICE.rglob("*.py"))
    if path.parent != SERVICE or path.name != "__init__.py"
}


def imports(module: str) -> Iterator[str]:
    """The imports of a module, inside functions too; names in the service come without its prefix."""
    path = MODULES[module]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("service.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides its direction"
            assert node.module is not None
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name.removeprefix("service.") for name in (node.module, *names))


def service_imports(module: str) -> Iterator[str]:
    return (imported for imported in imports(module) if depth(imported) is not None)


def depth(module: str) -> int | None:
    return next((depth for depth, names in enumerate(LAYERS) if package(module) in names), None)


def package(module: str) -> str:
    return module.partition(".")[0]


def is_within(module: str, place: str) -> bool:
    return module == place or module.startswith(f"{place}.")


def test_every_part_of_the_service_has_a_layer() -> None:
    assert [module for module in MODULES if depth(module) is None] == []


def test_imports_point_inwards() -> None:
    def may_import(module: str, imported: str) -> bool:
        own, its = depth(module), depth(imported)
        assert own is not None
        assert its is not None
        same_layer = its == own and (package(imported) == package(module) or "." not in module)
        value_types = is_within(module, "storage") and is_within(imported, "models.client")
        return its > own or same_layer or value_types

    assert [(it, by) for by in MODULES for it in service_imports(by) if not may_import(by, it)] == []


def test_no_face_of_the_api_imports_another_face_and_what_they_share_imports_none() -> None:
    def face_of(module: str) -> str | None:
        return next((face for face in FACES if is_within(module, face)), None)

    parts = [module for module in MODULES if is_within(module, "api.http") or face_of(module)]
    assert {face_of(module) for module in parts} == {*FACES, None}
    assert [
        (it, by) for by in parts for it in service_imports(by) if face_of(it) is not None and face_of(it) != face_of(by)
    ] == []


def test_only_the_supervisor_names_concrete_stores_and_model_clients() -> None:
    def is_concrete(imported: str) -> bool:
        top, *rest = imported.split(".")
        return top in PROTOCOLS and bool(rest) and rest[0] not in PROTOCOLS[top]

    # The commands for a store's file, beside the service, may do so too.
    commands = {"cli.store_commands", "cli.store_copy"}
    others = [module for module in MODULES if module not in {"supervisor", *commands}]
    assert [
        (it, by) for by in others for it in service_imports(by) if is_concrete(it) and package(it) != package(by)
    ] == []


def test_sessions_and_stores_know_no_frames_of_streams() -> None:
    """Events are data; the frames in files of earlier versions are read in one module."""
    inside = [module for module in MODULES if package(module) in ("sessions", "storage")]
    assert [
        module
        for module in inside
        if module != "storage.sqlite.old_frames"
        and any(word in MODULES[module].read_text() for word in ('"data:', "event-stream", "encode_frame", "api."))
    ] == []


def test_a_library_is_imported_only_in_its_place() -> None:
    assert [
        (it, by)
        for by in MODULES
        for it in imports(by)
        if package(it) in PLACES and not any(is_within(by, place) for place in PLACES[package(it)])
    ] == []


def test_the_client_to_copy_imports_nothing_of_this_project() -> None:
    imported = {
        package(name)
        for path in (SERVICE.parent / "clients").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in _imported(node)
    }
    assert imported - sys.stdlib_module_names == {"anyio", "httpx"}


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or "."] if isinstance(node, ast.ImportFrom) else []


def test_every_shield_has_a_deadline_of_its_own() -> None:
    """A shield whose bound is only in its body lasts for ever once the body changes."""

    def unbounded_shields(path: Path) -> Iterator[int]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(it, ast.Attribute) and it.attr == "shield" for it in targets):
                    yield node.lineno
            elif isinstance(node, ast.Call):
                keywords = {keyword.arg for keyword in node.keywords}
                is_scope = ast.unparse(node.func).endswith("CancelScope")
                if is_scope and "shield" in keywords and "deadline" not in keywords:
                    yield node.lineno

    assert [(module, line) for module, path in MODULES.items() for line in unbounded_shields(path)] == []


def test_only_the_settings_read_the_environment() -> None:
    def reads_it(path: Path) -> bool:
        nodes = ast.walk(ast.parse(path.read_text()))
        return any(isinstance(it, ast.Attribute) and it.attr in {"environ", "environb", "getenv"} for it in nodes)

    assert [module for module, path in MODULES.items() if reads_it(path)] == ["client_settings", "setting_sources"]
