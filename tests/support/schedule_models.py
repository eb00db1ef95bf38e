"""Schedules to test with, and models of what runs them that share no code with the package.

A micro-batch is a walk of 4S places: FE down, FF up, BF down, BE up. Everything else here follows from that.
"""

import random

from hypothesis import strategies as st

from lightning_januspipe.schedule import Action, MemoryCosts, Phase, PhaseCosts, Schedule

NAMES = ("gpipe", "1f1b-fold", "1f1b-2nd", "hanayo-2nd", "wavek", "wavek-zb")
COSTS = PhaseCosts(1.0, 1.3, 2.4, 1.25)
MEASURED = PhaseCosts(1.0, 1.5, 1.4, 0.9, 1.1, 0.6)
ONES = PhaseCosts(1.0, 1.0, 1.0, 1.0)
ALL_ONES = PhaseCosts(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)

times = st.floats(0.2, 5.0)
phase_costs = st.builds(PhaseCosts, times, times, times, times, st.floats(0.0, 2.0), st.floats(0.0, 2.0))
memory_costs = st.builds(MemoryCosts, st.floats(0.0, 8.0), st.floats(0.0, 8.0), st.floats(0.0, 8.0))


def actions(text):
    return tuple(map(Action.parse, text.split()))


def schedule_of(*orders, num_microbatches=1, placement=(), force_placement=()):
    """A schedule written by hand: one text of actions per rank."""
    return Schedule("hand", len(orders), num_microbatches, tuple(map(actions, orders)), placement, force_placement)


@st.composite
def requests(draw, name, max_ranks=8, max_microbatches=24):
    """Arguments of `build_schedule` that it must accept."""
    num_ranks = draw(st.integers(1, max_ranks))
    num_microbatches = draw(st.integers(1, max_microbatches))
    lengths = [num_ranks]
    if name in ("1f1b-2nd", "hanayo-2nd", "wavek-zb"):
        lengths += [2 * num_ranks, num_ranks + draw(st.integers(0, num_ranks))]
    many = st.sampled_from(lengths).flatmap(lambda n: st.lists(phase_costs, min_size=n, max_size=n))
    caps = st.integers(1, 2 * num_ranks + 2) | st.sampled_from([num_ranks, 2 * num_ranks])
    options = {
        "wave_size": draw(st.just("auto") | st.integers(1, num_microbatches + 2)),
        "max_live": draw(st.none() | (st.just(num_microbatches) if name == "gpipe" else caps)),
        "chunks": draw(st.just("auto") | st.integers(1, 3)),
        "latency": draw(st.just(0.0) | st.floats(0.0, 2.0)),
    }
    return (name, num_ranks, num_microbatches, draw(phase_costs | many)), options


def walk_place(action, num_stages):
    """The place of an action of the chain on the walk of its micro-batch."""
    phase, stage, _ = action
    lap = ("FE", "FF", "BF", "BE").index(phase.value)
    return lap * num_stages + (stage if lap % 2 == 0 else num_stages - 1 - stage)


def at_walk_place(place, num_stages, microbatch):
    """The action at a place of the walk."""
    lap, step = divmod(place, num_stages)
    phase = (Phase.FE, Phase.FF, Phase.BF, Phase.BE)[lap]
    return Action(phase, step if lap % 2 == 0 else num_stages - 1 - step, microbatch)


def waits_for(action, num_stages):
    """What must have ended before an action starts, as a set."""
    phase, stage, microbatch = action
    if phase is Phase.WF:
        return {Action(Phase.BF, stage, microbatch)}
    if phase is Phase.WE:
        return {Action(Phase.BE, stage, microbatch), Action(Phase.WF, stage, microbatch)}
    place = walk_place(action, num_stages)
    found = {at_walk_place(place - 1, num_stages, microbatch)} if place else set()
    own = {Phase.FF: Phase.FE, Phase.BF: Phase.FF, Phase.BE: Phase.BF}.get(phase)
    return found | ({Action(own, stage, microbatch)} if own else set())


def rank_of(schedule, action):
    is_force = action.phase in (Phase.FF, Phase.BF, Phase.WF)
    return (schedule.force_placement if is_force else schedule.placement)[action.stage]


def messages_from(schedule, action):
    """(receiver, action that waits for it) of every message of an action; along the walk first."""
    if action.phase in (Phase.WF, Phase.WE):
        return []
    num_stages, microbatch = schedule.num_stages, action.microbatch
    place = walk_place(action, num_stages)
    targets = [at_walk_place(place + 1, num_stages, microbatch)] if place + 1 < 4 * num_stages else []
    own = {Phase.FE: Phase.FF, Phase.BF: Phase.BE}.get(action.phase)
    if own and Action(own, action.stage, microbatch) not in targets:
        targets.append(Action(own, action.stage, microbatch))
    here = rank_of(schedule, action)
    return [(rank_of(schedule, target), target) for target in targets if rank_of(schedule, target) != here]


def can_execute(schedule, max_pending_sends, seed):
    """Runs the ranks in random turns, over channels that match sends with receives; returns False if they get stuck.

    A message passes once it is issued and its receive is posted. A rank posts the receives of the action that it is at,
    and of all that their senders send before; it goes on from a send while no more than ``max_pending_sends`` messages
    of the channel have not passed.
    """
    chance = random.Random(seed)
    ranks = range(schedule.num_ranks)
    channel = {(a, b): [] for a in ranks for b in ranks}
    for rank, order in enumerate(schedule.actions):
        for action in order:
            for receiver, target in messages_from(schedule, action):
                channel[rank, receiver].append((action, target))
    issued, posted, passed = (dict.fromkeys(channel, 0) for _ in range(3))
    kept = [set() for _ in ranks]
    done = [set() for _ in ranks]
    place, is_sending = [0] * schedule.num_ranks, [False] * schedule.num_ranks

    def turn(rank):
        """One small step of a rank; False if it can do nothing."""
        action = schedule.actions[rank][place[rank]]
        outgoing = {(rank, receiver) for receiver, _ in messages_from(schedule, action)}
        if is_sending[rank]:
            if max_pending_sends is not None and any(issued[c] - passed[c] > max_pending_sends for c in outgoing):
                return False
            is_sending[rank] = False
            place[rank] += 1
            return True
        needed = waits_for(action, schedule.num_stages)
        incoming = {(rank_of(schedule, n), rank, n) for n in needed if rank_of(schedule, n) != rank}
        has_posted = False
        for source, _, needed_action in incoming:
            number = channel[source, rank].index((needed_action, action)) + 1
            if posted[source, rank] < number:
                posted[source, rank] += 1
                has_posted = True
        if has_posted:
            return True
        if not all((needed_action, action) in kept[rank] for _, _, needed_action in incoming):
            return False
        if not all(n in done[rank] for n in needed if rank_of(schedule, n) == rank):
            return False
        done[rank].add(action)
        for receiver, _ in messages_from(schedule, action):
            issued[rank, receiver] += 1
        is_sending[rank] = True
        return True

    while unfinished := [rank for rank in ranks if place[rank] < len(schedule.actions[rank])]:
        chance.shuffle(unfinished)
        if not any(turn(rank) for rank in unfinished):
            return False
        for (source, receiver), messages in channel.items():
            while passed[source, receiver] < min(issued[source, receiver], posted[source, receiver]):
                kept[receiver].add(messages[passed[source, receiver]])
                passed[source, receiver] += 1
    return True


def start_times(schedule, duration, latency=0.0, occupied=0.0):
    """When each action starts, from its definition: once its rank is free and its messages are there.

    Args:
        schedule: A schedule that can run.
        duration: Time of an action.
        latency: Time that a message takes.
        occupied: Time for which it keeps the next ones of its channel waiting.
    """
    before, previous_message = {}, {}
    last_of_channel = {}
    for rank, order in enumerate(schedule.actions):
        before.update(zip(order, (None, *order), strict=False))
        for action in order:
            for receiver, target in messages_from(schedule, action):
                previous_message[action, target] = last_of_channel.get((rank, receiver))
                last_of_channel[rank, receiver] = (action, target)
    starts, gone = {}, {}

    def left(message):
        """When a message has left its channel free."""
        if message is None:
            return 0.0
        if message not in gone:
            gone[message] = max(end(message[0]), left(previous_message[message])) + occupied
        return gone[message]

    def end(action):
        return start(action) + duration(action)

    def start(action):
        if action not in starts:
            moments = [0.0 if before[action] is None else end(before[action])]
            for needed in waits_for(action, schedule.num_stages):
                is_here = rank_of(schedule, needed) == rank_of(schedule, action)
                moments.append(end(needed) if is_here else left((needed, action)) + latency)
            starts[action] = max(moments)
        return starts[action]

    for order in schedule.actions:
        for action in order:
            start(action)
    return starts
