"""Teach a TrOCR model new hands, words or scripts: `python -m services.ocr.finetune --data DIR --output DIR`.

Nothing of the service imports this package; it needs the `finetune` extra.
"""
