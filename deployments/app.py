"""The application: ``serve run deployments.app:build study=runs/demo``."""

# Annotations are not postponed here: FastAPI reads those of the routes after Serve has moved the class to a replica.

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from ray import serve
from ray.serve import Application
from starlette.exceptions import HTTPException

from deployments.errors import RETRY_AFTER, ApiError
from deployments.guard import Headers, error_response
from deployments.options import parse_options
from deployments.replica import Replica
from deployments.schema import ChatRequest, CompletionRequest, PatchRequest, components, documented
from deployments.service import Service, node_cpus

PLAYGROUND = Path(__file__).parent / "playground"

STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}

app = FastAPI(title="mage_ray", version="1", docs_url=None, redoc_url=None)
app.add_middleware(Headers)


def _document() -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        document.setdefault("components", {}).setdefault("schemas", {}).update(components())
        app.openapi_schema = document
    return app.openapi_schema


app.openapi = _document  # type: ignore[method-assign]


@app.exception_handler(HTTPException)
async def _no_such_route(request: Request, error: HTTPException) -> Response:
    got = f"{request.method} {request.url.path}"
    return error_response(ApiError.of(error.status_code, "path", got, "the paths of /openapi.json"))


@app.exception_handler(ApiError)
async def _refused(request: Request, error: ApiError) -> Response:
    return error_response(error)


@serve.deployment
@serve.ingress(app)
class Server:
    """The routes. Serve moves this class to its replicas by value, so all that it does is in ``Replica``."""

    def __init__(self, options: Any) -> None:
        self._replica = Replica(options)

    async def reconfigure(self, config: dict[str, Any]) -> None:
        await self._replica.reconfigure(config)

    def check_health(self) -> None:
        self._replica.check_health()

    def __del__(self) -> None:
        if hasattr(self, "_replica"):
            self._replica.close()

    @app.get("/", include_in_schema=False)
    async def page(self) -> Response:
        return FileResponse(PLAYGROUND / "index.html", headers={"cache-control": "no-cache"})

    @app.get("/playground/{name}", include_in_schema=False)
    async def page_part(self, name: str) -> Response:
        # Looked up among the files that are there: a name is never a path.
        parts = {path.name: path for path in PLAYGROUND.iterdir() if path.suffix in (".js", ".css")}
        if name not in parts:
            raise HTTPException(404)
        return FileResponse(parts[name], headers={"cache-control": "no-cache"})

    @app.get("/healthz")
    async def health(self) -> Response:
        if not self._replica.ready:
            return JSONResponse({"status": "rebuilding"}, 503, headers={"retry-after": str(RETRY_AFTER)})
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}}, response_class=PlainTextResponse)
    async def metrics(self) -> Response:
        return PlainTextResponse(self._replica.metrics.text(), headers={"cache-control": "no-store"})

    @app.get("/v1/models")
    async def models(self, request: Request) -> Response:
        self._replica.owner(request)
        return JSONResponse({"object": "list", "data": [self._replica.model()]})

    @app.get("/v1/models/{model}")
    async def model(self, request: Request, model: str) -> Response:
        self._replica.owner(request)
        return JSONResponse(self._replica.model(model))

    @app.get("/v1/objectives")
    async def objectives(self, request: Request) -> Response:
        self._replica.owner(request)
        return JSONResponse(self._replica.objectives())

    @app.get("/v1/front")
    async def front(self, request: Request) -> Response:
        self._replica.owner(request)
        return JSONResponse(await self._replica.front())

    @app.post("/v1/chat/completions", openapi_extra=documented(ChatRequest), responses=STREAMED)
    async def chat(self, request: Request) -> Response:
        return await self._replica.complete(request, "chat")

    @app.post("/v1/completions", openapi_extra=documented(CompletionRequest), responses=STREAMED)
    async def completion(self, request: Request) -> Response:
        return await self._replica.complete(request, "completion")

    @app.patch("/v1/generations/{id}", openapi_extra=documented(PatchRequest))
    async def change(self, request: Request, id: str) -> Response:
        return await self._replica.change(request, id)


def build(arguments: dict[str, Any]) -> Application:
    """The application for these arguments (``Options``; and ``revision``, the first of ``user_config``'s).

    Raises UserError, one line that names the argument.
    """
    given = dict(arguments)
    revision = str(given.pop("revision", "1"))
    options = parse_options(given)
    service = Service.configured(options, {})
    service.check_experts()  # What can't be served is told here, and not by a replica's log.
    bundles = options.bundles(node_cpus(options.selectors[0]))
    scale: dict[str, Any] = {"num_replicas": options.replicas}
    if options.max_replicas is not None:
        scale = {
            "autoscaling_config": {
                "min_replicas": options.replicas,
                "max_replicas": options.max_replicas,
                "target_ongoing_requests": max(1, options.rows // max(len(p.rows) for p in service.methods.values())),
            }
        }
    return Server.options(  # type: ignore[attr-defined]
        name="mage_ray",
        user_config={"revision": revision},
        ray_actor_options={"num_cpus": 0},
        placement_group_bundles=bundles,
        placement_group_strategy="STRICT_SPREAD" if options.guides_apart else "PACK",
        placement_group_bundle_label_selector=options.selectors,
        # More than may run and wait: those beyond are answered 429 by the replica itself.
        max_ongoing_requests=options.rows + options.queue + 64,
        graceful_shutdown_timeout_s=options.drain_seconds,
        health_check_period_s=5,
        **scale,
    ).bind(options)
