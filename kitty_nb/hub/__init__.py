"""The Hugging Face Hub's repositories become files in the models folder.

A room beside `catalog`: what is fetched here is found there. It needs the extra `hub`.
"""

from kitty_nb.hub.download import Download, Plan
from kitty_nb.hub.offers import HubFile, Offer, choose, list_offers, usual
from kitty_nb.hub.progress import DownloadProgress, DownloadStep, describe
from kitty_nb.hub.reference import HubReference
from kitty_nb.hub.repository import Repository, find_repository, hub_is_installed

__all__ = [
    "Download",
    "DownloadProgress",
    "DownloadStep",
    "HubFile",
    "HubReference",
    "Offer",
    "Plan",
    "Repository",
    "choose",
    "describe",
    "find_repository",
    "hub_is_installed",
    "list_offers",
    "usual",
]
