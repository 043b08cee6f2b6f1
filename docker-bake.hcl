// Builds every image: docker buildx bake, or make images. docs/containers.md

variable "REGISTRY" {
  // With a slash at its end, such as "registry.example.com/"; empty for images of this machine.
  default = ""
}

variable "VERSION" {
  default = "0.1.0"
}

variable "REVISION" {
  // The commit that is built: REVISION=$(git rev-parse HEAD)
  default = "unknown"
}

group "default" {
  targets = ["cpu", "cuda", "rocm"]
}

group "cpu" {
  targets = ["gateway", "ocr-cpu", "diffusion-cpu", "compiler-cpu"]
}

group "cuda" {
  targets = ["gateway", "ocr-cuda", "diffusion-cuda", "compiler-cuda"]
}

group "rocm" {
  targets = ["gateway", "ocr-rocm", "diffusion-rocm", "compiler-rocm"]
}

group "finetune" {
  targets = ["finetune-cpu", "finetune-cuda", "finetune-rocm"]
}

target "common" {
  context = "."
  platforms = ["linux/amd64"]
  args = {
    VERSION = VERSION
    REVISION = REVISION
  }
  // All that is in the image, the operating system included, and how it was built. A registry can hold that; the images of
  // a Docker engine cannot.
  attest = REGISTRY == "" ? [] : ["type=sbom", "type=provenance,mode=max"]
}

target "gateway" {
  inherits = ["common"]
  dockerfile = "services/gateway/Dockerfile"
  target = "cpu"
  tags = ["${REGISTRY}inkwell/gateway:${VERSION}"]
}

target "model" {
  name = "${service}-${hardware}"
  matrix = {
    service = ["ocr", "diffusion", "compiler"]
    hardware = ["cpu", "cuda", "rocm"]
  }
  inherits = ["common"]
  dockerfile = "services/${service}/Dockerfile"
  target = hardware
  tags = ["${REGISTRY}inkwell/${service}:${VERSION}-${hardware}"]
}

// The OCR service with what teaching a model needs besides: python -m services.ocr.finetune.
target "teaching" {
  name = "finetune-${hardware}"
  matrix = {
    hardware = ["cpu", "cuda", "rocm"]
  }
  inherits = ["common"]
  dockerfile = "services/ocr/Dockerfile"
  target = hardware
  args = {
    EXTRAS = "${hardware},finetune"
  }
  tags = ["${REGISTRY}inkwell/finetune:${VERSION}-${hardware}"]
}
