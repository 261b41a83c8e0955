"""What a chat template does with the texts of messages, told from its syntax tree."""

from __future__ import annotations

from collections.abc import Iterator

_PLACES = frozenset(("first", "last", "index", "index0", "revindex", "revindex0", "length"))
"""What a loop says of its place; its other attributes lead to messages."""


def only_writes(source: str) -> bool:
    """Whether a chat template does nothing with a message but to write its content, trimmed perhaps, and to look at its
    role. Then what it writes around contents is the same whatever they are. False if in doubt."""
    import jinja2
    from jinja2 import nodes

    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    except jinja2.TemplateSyntaxError:
        return False
    # Each of these could take what was written and look at it again.
    again = (nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock, nodes.Block, nodes.Extends)
    if next(tree.find_all((*again, nodes.Include, nodes.Import, nodes.FromImport)), None) is not None:
        return False
    loops = {id(loop.target): loop for loop in tree.find_all(nodes.For)}
    over = {t.target.name for t in loops.values() if isinstance(t.target, nodes.Name) and _is(t.iter, "messages")}
    return all(_harmless(path, over) for path in _paths(tree, ()) if isinstance(path[-1], nodes.Name))


def _harmless(path: tuple[object, ...], over: set[str]) -> bool:
    """Whether the name at the end of a path from the root is none of a message, or is used as it may be."""
    from jinja2 import nodes

    name, parents = path[-1], path[-2::-1]
    assert isinstance(name, nodes.Name)
    if name.name == "loop":
        return isinstance(parents[0], nodes.Getattr) and parents[0].attr in _PLACES
    if name.name not in over | {"messages"}:
        return True
    if isinstance(parents[0], nodes.For):  # the loop over the messages itself, or another that gives the name away
        loop = parents[0]
        return (
            _is(loop.iter, "messages")
            and name in (loop.iter, loop.target)
            and (name.name == "messages") is (name is loop.iter)
        )
    if name.name == "messages":  # one message by its number
        if not (isinstance(parents[0], nodes.Getitem) and isinstance(parents[0].arg, nodes.Const)):
            return False
        parents = parents[1:]
    key = _key(parents[0])
    return key == "role" or (key == "content" and _written(parents[1:]))


def _written(parents: tuple[object, ...]) -> bool:
    """Whether a value goes straight to the output, joined to others and trimmed at most."""
    from jinja2 import nodes

    for node in parents:
        if isinstance(node, nodes.Output):
            return True
        trims = isinstance(node, nodes.Filter) and node.name == "trim" and not node.args and not node.kwargs
        if not trims and not isinstance(node, nodes.Add | nodes.Concat):
            return False
    return False


def _key(node: object) -> str:
    from jinja2 import nodes

    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return str(node.arg.value)
    return ""


def _is(node: object, name: str) -> bool:
    from jinja2 import nodes

    return isinstance(node, nodes.Name) and node.name == name


def _paths(node: object, above: tuple[object, ...]) -> Iterator[tuple[object, ...]]:
    from jinja2 import nodes

    assert isinstance(node, nodes.Node)
    path = (*above, node)
    yield path
    for child in node.iter_child_nodes():
        yield from _paths(child, path)
