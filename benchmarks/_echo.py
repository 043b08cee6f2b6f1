"""`python -m benchmarks._echo PORT`: a service that does nothing but answer, for measuring what stands before it.

Bytes in, the same bytes out: once for `UNARY`, MESSAGES times for `STREAM`. The paths are the OCR service's, which the
gateway routes.
"""

import sys

import grpc
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

UNARY = "/inkwell.ocr.v1.OcrService/Recognize"
STREAM = "/inkwell.ocr.v1.OcrService/StreamRecognize"
MESSAGES = 50


class _Echo(grpc.GenericRpcHandler):  # type: ignore[misc]
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if handler_call_details.method == UNARY:
            return grpc.unary_unary_rpc_method_handler(_once)
        if handler_call_details.method == STREAM:
            return grpc.unary_stream_rpc_method_handler(_often)
        return None


async def _once(request: bytes, _context: grpc.aio.ServicerContext) -> bytes:
    return request


async def _often(request: bytes, context: grpc.aio.ServicerContext) -> None:
    for _ in range(MESSAGES):
        await context.write(request)


async def _serve(port: int) -> None:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)])
    servicer = health.aio.HealthServicer()
    await servicer.set("readiness", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_generic_rpc_handlers((_Echo(),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
