"""Plain references for the system scheduler: one walks tick by tick, one follows definitions recursively.

Both read the tasks themselves and share no code with the scheduler.
"""

from fractions import Fraction
from math import ceil

CAUSES = ("dependency", "not_before", "idle")


def costs(system, task):
    """(ticks that the server is held, ticks until the result arrives after that)."""
    tick = system.clock.period_s
    for device in system.devices:
        if device.name == task.device:
            own = tick if device.clock is None else device.clock.period_s
            return ceil(Fraction(task.duration_ticks) * own / tick), 0
    (link,) = [k for k in system.links if k.name == task.device]
    return ceil(Fraction(task.bytes) / (link.bytes_per_s * tick)), ceil(link.latency_s / tick)


def first_ready(system, tasks):
    """({task: (start, arrival)}, {server: {"busy" or cause: ticks}}, ticks), one tick after another."""
    start, arrival, ready = {}, {}, {}
    held_until = {s: 0 for s in system.servers()}
    usage = {s: dict.fromkeys(("busy", *CAUSES), 0) for s in system.servers()}
    now = 0
    while True:

        def there(name, now=now):
            return name in arrival and arrival[name] <= now

        changed = True
        while changed:
            changed = False
            for t in tasks:
                if t.name not in ready and t.not_before <= now and all(map(there, t.after)):
                    ready[t.name], changed = now, True
                    if costs(system, t)[0] == 0:
                        start[t.name], arrival[t.name] = now, now + costs(system, t)[1]
        own = {s: [t for t in tasks if t.device == s and costs(system, t)[0] > 0] for s in system.servers()}
        for server in system.servers():
            queue = [t for t in own[server] if t.name in ready and t.name not in start]
            if held_until[server] <= now and queue:
                t = min(queue, key=lambda t: (ready[t.name], t.priority, tasks.index(t)))
                service, lag = costs(system, t)
                start[t.name], held_until[server] = now, now + service
                arrival[t.name] = now + service + lag
        if all(there(t.name) for t in tasks):
            return {n: (start[n], arrival[n]) for n in start}, usage, now
        for server in system.servers():
            to_come = [t for t in own[server] if t.name not in start]
            if held_until[server] > now:
                state = "busy"
            elif any(not there(name) for t in to_come for name in t.after):
                state = "dependency"
            elif any(t.not_before > now for t in to_come):
                state = "not_before"
            else:
                state = "idle"
            usage[server][state] += 1
        now += 1


def longest_path(system, tasks):
    """{task: arrival} were every task served the moment it is ready: no schedule is faster."""
    by_name = {t.name: t for t in tasks}

    def done(name):
        t = by_name[name]
        return max([t.not_before, *map(done, t.after)]) + sum(costs(system, t))

    return {t.name: done(t.name) for t in tasks}


def listed_order(system, tasks):
    """{task: start} with each server serving its own tasks in the order of the list."""
    by_name = {t.name: t for t in tasks}

    def start(t):
        begin = max([t.not_before, *(start(by_name[n]) + sum(costs(system, by_name[n])) for n in t.after)])
        if costs(system, t)[0] == 0:
            return begin
        own = [u for u in tasks if u.device == t.device and costs(system, u)[0] > 0]
        place = own.index(t)
        return max(begin, start(own[place - 1]) + costs(system, own[place - 1])[0]) if place else begin

    return {t.name: start(t) for t in tasks}
