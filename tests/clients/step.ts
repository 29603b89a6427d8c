// What a drive in TypeScript says: a line a step, `name<TAB>what came of it`, the name before the step
// begins. The step of a line that was not finished is the one that failed. (The drives in Python have `step.py`.)

/** Names the step, does it and says what came of it; gives on the step's value. */
export async function step<T>(name: string, action: () => Promise<readonly [T, string]>): Promise<T> {
  process.stdout.write(`${name}\t`);
  const [value, said] = await action();
  process.stdout.write(`${said}\n`);
  return value;
}

/** `name` of the environment. */
export function given(name: string): string {
  const value = process.env[name];
  if (!value) throw new Error(`${name} is not set`);
  return value;
}
