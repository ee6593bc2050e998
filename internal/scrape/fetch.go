package scrape

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/pillion-proxy/pillion/internal/promtext"
)

// localhost is the host in requests to the workload's loopback address, for both families.
const localhost = "localhost"

// newClient opens one connection for each request, so that the workload has no open connection between two scrapes. It
// follows redirects within the target's host and port.
func newClient(dial func(ctx context.Context, network, addr string) (net.Conn, error)) *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				host, port, err := net.SplitHostPort(addr)
				if err != nil || host != localhost {
					return dial(ctx, network, addr)
				}
				conn, err := dial(ctx, network, net.JoinHostPort("127.0.0.1", port))
				if errors.Is(err, syscall.ECONNREFUSED) {
					return dial(ctx, network, net.JoinHostPort("::1", port))
				}
				return conn, err
			},
			DisableKeepAlives:      true,
			DisableCompression:     true, // decoded decompresses, with a limit
			MaxResponseHeaderBytes: 64 << 10,
		},
		CheckRedirect: func(next *http.Request, via []*http.Request) error {
			if next.URL.Scheme != "http" || next.URL.Host != via[0].URL.Host {
				return fmt.Errorf("redirected to another host, %.80q; set the port and path of the metrics", next.URL.Host)
			}
			if len(via) > 3 {
				return errors.New("redirected more than three times")
			}
			return nil
		},
	}
}

// fetch gets and parses one target's exposition. It forwards the scraper's User-Agent and the remaining time.
func (h *handler) fetch(ctx context.Context, target Target, scraper http.Header, format promtext.Format) ([]promtext.Family, error) {
	host := h.Host
	if host == "" {
		host = localhost
	}
	url := "http://" + net.JoinHostPort(host, strconv.Itoa(int(target.Port))) + target.Path
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	request.Header.Set("User-Agent", "pillion")
	if agent := scraper.Get("User-Agent"); agent != "" {
		request.Header.Set("User-Agent", agent)
	}
	if deadline, ok := ctx.Deadline(); ok {
		request.Header.Set(timeoutField, strconv.FormatFloat(time.Until(deadline).Seconds(), 'f', 3, 64))
	}
	request.Header.Set("Accept-Encoding", "gzip")
	// Prefer the format that needs no conversion.
	request.Header.Set("Accept", "text/plain;version=0.0.4,application/openmetrics-text;version=1.0.0;q=0.5")
	if format == promtext.OpenMetrics {
		request.Header.Set("Accept", "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5")
	}
	response, err := h.client.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answers %.80s", url, response.Status)
	}
	is, err := promtext.FormatOf(response.Header.Get("Content-Type"))
	if err != nil {
		return nil, fmt.Errorf("%s answers with %w", url, err)
	}
	body, err := decoded(response, h.limits.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", url, err)
	}
	families, err := promtext.Parse(body, is, h.limits)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", url, err)
	}
	return families, nil
}

// decoded returns the response's body, decompressed. It bounds the compressed bytes; promtext bounds the decompressed ones.
func decoded(response *http.Response, limit int) (io.Reader, error) {
	switch coding := response.Header.Get("Content-Encoding"); strings.ToLower(coding) {
	case "", "identity":
		return response.Body, nil
	case "gzip":
		return gzip.NewReader(io.LimitReader(response.Body, int64(limit)))
	default:
		return nil, fmt.Errorf("Content-Encoding %.40q was not requested", coding)
	}
}
