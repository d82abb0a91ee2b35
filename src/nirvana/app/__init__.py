"""A local web page with three rooms: scans, reports and text; `nirvana app` serves it.

Files `*_work.py` compute, without Gradio; files `*_room.py` lay out a room and connect it.
"""
