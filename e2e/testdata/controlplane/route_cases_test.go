package controlplane

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"io"
	"os"
	"strings"
	"testing"

	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
)

// routeCases has the routes that istiod pushed in each case, as the tests of internal/route read them, where there are no
// generated types: the name of the case and of the routes, and the routes, each after its length.
const routeCases = "../../../internal/route/testdata/pushes.gz"

func TestTheCasesOfRoutesAreTheRecordedOnes(t *testing.T) {
	var want []byte
	each(t, "rds.json", func(_ *testing.T, place string, b []byte) {
		name, isCase := strings.CutPrefix(place, "xds-cases/")
		if !isCase || strings.Contains(name, "delta") || strings.HasPrefix(name, "watch") {
			return
		}
		name = strings.Replace(name, "rds.json", unpack(b, &route.RouteConfiguration{}).Name, 1)
		for _, part := range [][]byte{[]byte(name), b} {
			want = append(binary.AppendUvarint(want, uint64(len(part))), part...)
		}
	})
	if *update {
		var packed bytes.Buffer
		w, _ := gzip.NewWriterLevel(&packed, gzip.BestCompression)
		w.Write(want)
		w.Close()
		if err := os.WriteFile(routeCases, packed.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	packed, err := os.ReadFile(routeCases)
	if err != nil {
		t.Fatal(err)
	}
	r, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s has other routes (%v); use -update", routeCases, err)
	}
}
