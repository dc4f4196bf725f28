"""The app: purify a small model from a form in the browser, see before and after, take the run folder home.

`form` is what the browser shows, `orders` carries out what it says, `guests` is what strangers may ask for.
"""
