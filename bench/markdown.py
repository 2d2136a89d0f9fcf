"""Tables of pages, and the line that says what they were measured on."""

from typing import Any


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(result: dict[str, Any]) -> str:
    env, clock = result["env"], result.get("clock", "time")
    cores = f"{result['cores']} cores" if clock == "time" else clock
    return (
        f"{env['processor']}, {cores}, {env['kernels']['libgapkern_cpu']}, "
        f"torch {env['versions']['torch']}, medians, {result['date']}."
    )
