package configview

import (
	"encoding/json"
	"errors"
	"net/http"
	"strings"

	"github.com/pillion-proxy/pillion/internal/controlplane"
)

// Handler serves
//
//	GET /config/KIND[?name=NAME]  a View; 404 if no object has the name
//	GET /config/findings          {"findings": […]}
//
// KIND is one of Kinds. A nil resources stands for an agent without a control plane, and every request is answered with 404
// and the reason.
func Handler(resources func() controlplane.Resources) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		what, ok := strings.CutPrefix(r.URL.Path, "/config/")
		switch {
		case !ok:
			http.NotFound(w, r)
		case resources == nil:
			http.Error(w, noControlPlane, http.StatusNotFound)
		case what == "findings":
			serve(w, struct {
				Findings []Finding `json:"findings"`
			}{FindingsOf(resources())})
		default:
			serveView(w, r, resources, what)
		}
	})
}

const noControlPlane = "this agent has no control plane: set --control-plane"

func serveView(w http.ResponseWriter, r *http.Request, resources func() controlplane.Resources, what string) {
	kind, err := ParseKind(what)
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	view, err := Show(resources(), kind, r.URL.Query().Get("name"))
	if errors.Is(err, ErrNotFound) {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	serve(w, view)
}

func serve(w http.ResponseWriter, value any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(value) // an error means that the client left
}
