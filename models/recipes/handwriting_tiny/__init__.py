"""Recipe of ``handwriting-tiny``: a small VisionEncoderDecoderModel that reads one line of Latin handwriting."""
