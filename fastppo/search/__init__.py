"""Search for better answers with a policy as it is: several samples and a choice among them, a critic that looks one token ahead, a tree of steps."""

from fastppo.search.answers import Found, best_of_n, last_match, majority_vote, value_score
from fastppo.search.critic_values import critic_values, load_critic
from fastppo.search.lookahead import value_guided
from fastppo.search.tree import Node, TreeParams, puct

__all__ = [
    "Found",
    "Node",
    "TreeParams",
    "best_of_n",
    "critic_values",
    "last_match",
    "load_critic",
    "majority_vote",
    "puct",
    "value_guided",
    "value_score",
]
