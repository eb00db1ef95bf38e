"""Spreads the experts of a captured potential over ranks: rows travel to the ranks of their experts, and back."""

from lightning_januspipe.expert_ranks.insert_row_exchanges import SpreadExperts, spread_experts
from lightning_januspipe.expert_ranks.row_exchange import RowExchange, bounds_of, plan_rows, return_rows, send_rows
from lightning_januspipe.expert_ranks.step_plans import ExpertAxis, ExpertGroup

__all__ = [
    "ExpertAxis",
    "ExpertGroup",
    "RowExchange",
    "SpreadExperts",
    "bounds_of",
    "plan_rows",
    "return_rows",
    "send_rows",
    "spread_experts",
]
