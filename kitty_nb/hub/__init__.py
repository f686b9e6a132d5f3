"""Models of the Hugging Face Hub, fetched into the models folder.

A room beside `catalog`: what is fetched here is found there. It needs the extra `hub`.
"""
