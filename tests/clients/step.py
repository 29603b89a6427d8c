"""What a drive in Python says: a line a step, `name<TAB>what came of it`, the name before the step begins. The step
of a line that was not finished is the one that failed. (The drives in TypeScript have `step.ts`.)"""


def step(name, action):
    """Names the step, does it and says what came of it: the second of two returned values, or the only one."""
    print(name, end="\t", flush=True)
    result = action()
    value, said = result if isinstance(result, tuple) else (result, result)
    print(said, flush=True)
    return value


def expect(held, *seen):
    """An assertion that stays when Python is told to leave assertions out."""
    if not held:
        raise AssertionError(seen)
