"""Function bodies as compiled code: taken from one module, given to another.

A submission that has not written a function runs with the reference's body in its place: among its
own globals, so that it calls what the submission has. Source text goes nowhere.
"""

import inspect
import marshal
import types


def function_at(module, name):
    """(where it stands, its last name, the plain function or None) of "name" or "Class.name"."""
    owner, _, last = name.rpartition(".")
    place = getattr(module, owner, None) if owner else module
    found = vars(place).get(last) if place is not None else None
    found = inspect.unwrap(getattr(found, "__func__", found)) if found is not None else None
    return place, last, found if isinstance(found, types.FunctionType) else None


def anonymous(code):
    """The code object without the path of the file that it came from."""
    inner = [anonymous(x) if isinstance(x, types.CodeType) else x for x in code.co_consts]
    return code.replace(co_filename="the reference", co_consts=tuple(inner))


def take(module, names):
    """{name: (code, defaults, keyword defaults), in bytes} of these functions of a module."""
    found = {}
    for name in names:
        function = function_at(module, name)[2]
        parts = anonymous(function.__code__), function.__defaults__, function.__kwdefaults__
        found[name] = marshal.dumps(parts)
    return found


def refusal(says):
    """The body of a function that is not to be had."""

    def missing(*args, **options):
        raise NotImplementedError("not here")

    code = missing.__code__
    constants = tuple(says if x == "not here" else x for x in code.co_consts)
    return marshal.dumps((anonymous(code.replace(co_consts=constants)), None, None))


def give(module, bodies):
    """Replace functions of a module by such bodies, in place; one that is not there is made."""
    for name, raw in bodies.items():
        code, defaults, options = marshal.loads(raw)
        place, last, function = function_at(module, name)
        if function is not None and not function.__closure__:
            function.__code__ = code
            function.__defaults__, function.__kwdefaults__ = defaults, options
        elif place is not None:
            made = types.FunctionType(code, module.__dict__, last, defaults)
            made.__kwdefaults__ = options
            setattr(place, last, made)
