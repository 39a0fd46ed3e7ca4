"""A placed and routed section as an SVG."""

from collections.abc import Iterator
from fractions import Fraction
from html import escape

from tilewright.arch.rdu import NETWORKS
from tilewright.mappers.rdu.fabric import LOCAL, STEP, Fabric
from tilewright.mappers.rdu.netlist import Netlist
from tilewright.mappers.rdu.place import Placement
from tilewright.mappers.rdu.route import Link, Routing

__all__ = ["draw"]

PITCH = 56  # pixels from switch to switch
FILL = {"pcu": "#cfe3f7", "pmu": "#fbe6c5", "agcu": "#d8efd3"}
MEANING = {"pcu": "PCU, compute", "pmu": "PMU, memory", "agcu": "AGCU, gate to memory"}
COLOURS = ((Fraction(1, 2), "#3a7d44", "up to 50 %"), (Fraction(1), "#d98e04", "up to 100 %"))
OVER = ("#c0262d", "over 100 %")


def _colour(use: Fraction) -> str:
    return next((colour for limit, colour, _ in COLOURS if use <= limit), OVER[0])


def _text(x: float, y: float, text: str, size: int = 9, anchor: str = "middle", room: float = 0) -> str:
    fit = f' textLength="{room:g}" lengthAdjust="spacingAndGlyphs"' if room else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"{fit}>{escape(text)}</text>'


def draw(netlist: Netlist, fabric: Fabric, placement: Placement, routing: Routing, title: str = "") -> str:
    """The SVG text: units with their names, links as wide as their load, coloured by load over capacity.

    Each direction of a link is a line of its own, on its right-hand side; streams are named in its tooltip.
    """
    legend = 96
    width, height = max((fabric.columns + 2) * PITCH, 620), (fabric.rows + 1) * PITCH + legend
    size = f'width="{width}" height="{height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">',
        f'<rect {size} fill="#fff"/>',
        *_units(netlist, fabric, placement),
        *_links(fabric, routing),
        *_legend(netlist, routing, title, height - legend + 14),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _centre(x: int, y: int) -> tuple[float, float]:
    return (x + 1.5) * PITCH, (y + 0.75) * PITCH


def _units(netlist: Netlist, fabric: Fabric, placement: Placement) -> Iterator[str]:
    names = {site: name for name, site in placement.sites.items()}
    for i, site in enumerate(fabric.sites):
        x, y = _centre(site.x, site.y)
        if site.port < LOCAL:
            x, y = x + STEP[site.port][0] * 0.85 * PITCH, y + STEP[site.port][1] * 0.85 * PITCH
        side = 0.58 * PITCH
        name = names.get(i)
        style = 'fill="#f4f4f4" stroke="#ddd"' if name is None else f'fill="{FILL[site.kind]}" stroke="#888"'
        yield (
            f'<rect x="{x - side / 2:g}" y="{y - side / 2:g}" width="{side:g}" height="{side:g}" rx="4" {style}>'
            f"<title>{escape(name or 'free')} ({site.kind} {site.x},{site.y})</title></rect>"
        )
        if name is not None:
            yield _text(x, y + 3, name, room=side - 4 if len(name) > 5 else 0)


def _links(fabric: Fabric, routing: Routing) -> Iterator[str]:
    on: dict[str, dict[Link, list[str]]] = {network: {} for network in NETWORKS}
    for r in routing.routes.values():
        source = r.hops[0]
        links = [Link(source.x, source.y, source.port, into=True)]
        links += [Link(h.x, h.y, out) for h in r.hops for out in h.outs]
        for link in links:
            on[r.stream.network].setdefault(link, []).append(r.stream.name)
    for lane, network in enumerate(NETWORKS):
        for link, load in routing.loads[network].items():
            if link.port >= LOCAL:
                continue  # between a unit and its own switch
            x, y = _centre(link.x, link.y)
            dx, dy = STEP[link.port]
            near, far = 0.29 * PITCH, (0.71 if fabric.neighbour(*link[:3]) else 0.56) * PITCH
            if link.into:
                near, far = far, near
            # To the right of the way, so that both directions are seen; scalar streams further out.
            away = (5 + 7 * lane) * (-1 if link.into else 1)
            x, y = x - dy * away, y + dx * away
            use = load / fabric.capacity
            yield (
                f'<line x1="{x + dx * near:g}" y1="{y + dy * near:g}" x2="{x + dx * far:g}" y2="{y + dy * far:g}" '
                f'stroke="{_colour(use)}" stroke-width="{1 + 4 * min(1.5, float(use)):.2f}"'
                f"{' stroke-dasharray=' + chr(34) + '3 2' + chr(34) if lane else ''}>"
                f"<title>{network}, {float(100 * use):.1f} %: {escape(', '.join(on[network][link]))}</title></line>"
            )


def _legend(netlist: Netlist, routing: Routing, title: str, y: float) -> Iterator[str]:
    counts = {kind: sum(u.kind == kind for u in netlist.units) for kind in FILL}
    facts = f"{len(netlist.units)} units, {len(routing.routes)} streams, {routing.hops} links in use"
    facts += f", slow-down {float(routing.slow_down):.3g}"
    yield _text(20, y + 8, f"{title}: {facts}" if title else facts, 12, "start")
    x = 20.0
    for kind, fill in FILL.items():
        yield f'<rect x="{x:g}" y="{y + 22:g}" width="12" height="12" rx="2" fill="{fill}" stroke="#888"/>'
        yield _text(x + 18, y + 32, f"{counts[kind]} x {MEANING[kind]}", 11, "start")
        x += 190
    x = 20.0
    for colour, label in (*((c, f"load {words}") for _, c, words in COLOURS), (OVER[0], f"load {OVER[1]}")):
        yield f'<line x1="{x:g}" y1="{y + 50:g}" x2="{x + 24:g}" y2="{y + 50:g}" stroke="{colour}" stroke-width="4"/>'
        yield _text(x + 30, y + 54, label, 11, "start")
        x += 150
    yield _text(x, y + 54, "solid: vectors, dashed: scalars", 11, "start")
