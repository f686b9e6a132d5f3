# JupyterLab with the control notebook, and llama.cpp's own server from the xllamacpp wheel:
#   docker build -t kitty_nb .
#   docker run --rm -p 127.0.0.1:8888:8888 -v kitty_nb:/home/kitty kitty_nb
FROM python:3.13-slim

# xllamacpp computes with OpenMP, which the slim image lacks.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*

COPY . /opt/kitty_nb
RUN pip install --no-cache-dir '/opt/kitty_nb[embedded,experiments,hub,proxy]' \
    && useradd --create-home kitty

USER kitty
WORKDIR /home/kitty
EXPOSE 8888
CMD ["kitty-nb", "lab", "--no-browser", "--ip=0.0.0.0"]
